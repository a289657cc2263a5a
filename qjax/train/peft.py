"""Adapters as a folder that PEFT loads: adapter_config.json and safetensors.

https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

import json
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from qjax.io.folder import published
from qjax.models import architecture
from qjax.train.lora import Adapters, LoRA, Place

PREFIX = "base_model.model."


def save_peft(
    path: str | os.PathLike[str],
    adapters: Adapters,
    model_type: str,
    config: Any,
    base_model: str = "",
) -> Path:
    """Write adapters as PEFT does.

    Args:
      path: a folder that does not exist yet.
      adapters: as trained.
      model_type: of the base model's `config.json`, such as "llama".
      config: the base model's configuration, as `load_model` gives it.
      base_model: `base_model_name_or_path`, the base model's folder or hub id.

    Returns:
      The folder's path.

    Raises:
      FileExistsError: the folder exists.
      ValueError: an adapted leaf is no single linear of the checkpoint.
    """
    path = Path(path).resolve()
    if path.exists():
        raise FileExistsError(f"{path} exists; give the name of a new folder")
    modules = _modules(architecture(model_type), config)
    tensors: dict[str, np.ndarray] = {}
    names: list[str] = []
    for leaf, place in adapters.places:
        for name, factors in _layers(place, adapters.leaves[leaf]):
            module = modules.get(name)
            if module is None or place.layout.batch_axes:
                raise ValueError(
                    f"{name} is no single linear of a {model_type} checkpoint; PEFT "
                    "has no place for its adapter"
                )
            names.append(module)
            tensors |= _tensors(module, factors)
    body = _config(adapters.config, names, base_model)
    with published(path) as folder:
        text = json.dumps(body, indent=2, sort_keys=True) + "\n"
        (folder / "adapter_config.json").write_text(text, encoding="utf-8")
        file = folder / "adapter_model.safetensors"
        save_file(tensors, file, metadata={"format": "pt"})
    return path


def _modules(module: ModuleType, config: Any) -> dict[str, str]:
    """The checkpoint's module for each linear, by the name that patterns see."""
    found = {}
    for row in module.names(config):
        if not row.transpose or "{expert}" in row.hf:
            continue
        for layer in range(config.layers if "{layer}" in row.path else 1):
            hf = row.hf.format(layer=layer).removesuffix(".weight")
            found[row.path.format(layer=layer)] = hf
    return found


def _layers(place: Place, factors: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Each layer's name and factors."""
    if not place.layers:
        return [(place.names[0], factors)]
    flat = jax.tree.map(
        lambda x: np.asarray(x).reshape(-1, *x.shape[len(place.layers) :]), factors
    )
    return [
        (name, jax.tree.map(lambda x, i=i: x[i], flat))
        for i, name in enumerate(place.names)
    ]


def _tensors(module: str, factors: dict[str, Any]) -> dict[str, np.ndarray]:
    """PEFT keeps `A` as `[r, in]` and `B` as `[out, r]`."""
    name = PREFIX + module
    tensors = {
        f"{name}.lora_A.weight": _row_major(factors["a"].T),
        f"{name}.lora_B.weight": _row_major(factors["b"].T),
    }
    if "magnitude" in factors:
        tensors[f"{name}.lora_magnitude_vector"] = _row_major(factors["magnitude"])
    return tensors


def _row_major(x: Any) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(x, np.float32))


def _config(config: LoRA, names: list[str], base_model: str) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model or None,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.rslora,
        "use_dora": config.dora,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "target_modules": sorted(names),
    }
