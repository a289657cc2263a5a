"""Architectures in plain Flax NNX, one file each; this is the registry.

An architecture's module has `from_fields(fields) -> config`, `build(config, rngs=,
dtype=, scan_layers=, remat=) -> nnx.Module`, `names(config)`, the table of its
checkpoint's tensors, and `PREFIX`, which bare checkpoints leave out of their names.
"""

from pathlib import Path
from types import ModuleType

from qjax.models import (
    bert,
    gemma2,
    gemma3,
    gpt2,
    llama,
    mistral,
    mixtral,
    opt,
    phi3,
    qwen2,
    qwen3,
    qwen3_moe,
)
from qjax.models.functional import Function, functional
from qjax.models.generate import generate

__all__ = [
    "ARCHITECTURES",
    "BUNDLED",
    "Function",
    "architecture",
    "functional",
    "generate",
]

BUNDLED = Path(__file__).parent / "tiny_llama"
"""The folder of the bundled model, a Llama of 7M parameters."""

ARCHITECTURES: dict[str, ModuleType] = {
    "bert": bert,
    "gemma2": gemma2,
    "gemma3_text": gemma3,
    "gpt2": gpt2,
    "llama": llama,
    "mistral": mistral,
    "mixtral": mixtral,
    "opt": opt,
    "phi3": phi3,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "qwen3_moe": qwen3_moe,
}


def architecture(model_type: str) -> ModuleType:
    """The module of a `model_type` in `config.json`.

    Raises:
      ValueError: there is none; the message lists those there are.
    """
    if model_type not in ARCHITECTURES:
        raise ValueError(
            f"config.json: model_type is {model_type!r}, supported are "
            + ", ".join(ARCHITECTURES)
        )
    return ARCHITECTURES[model_type]
