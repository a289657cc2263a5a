"""Let llm-compressor write checkpoints, with the logits of its own model.

Runs in the environment of `llmcompressor_env.sh`; names choose among the cases:

    python scripts/parity/checkpoints_llmcompressor.py BASE OUT [CASE ...]
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from checkpoints import (
    calibration,
    float_model,
    keep_logits,
    tokenizer,
    write_cases,
)
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

LINEARS: dict[str, Any] = {"targets": ["Linear"], "ignore": ["lm_head"]}


def integers(bits: int, **more: Any) -> dict[str, Any]:
    """A group of a recipe: whole numbers in groups of 32 inputs."""
    weights = {"num_bits": bits, "type": "int", "strategy": "group", "group_size": 32}
    return {
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": weights | more}
        },
        "ignore": ["lm_head"],
    }


def mixed() -> dict[str, Any]:
    """4 bits, but 8 for the layers that come down."""
    four = integers(4, symmetric=False)["config_groups"]["group_0"]
    weights = {"num_bits": 8, "type": "int", "strategy": "channel"}
    eight = {"targets": ["re:.*down_proj$"], "weights": weights}
    return {"config_groups": {"a": four, "b": eight}, "ignore": ["lm_head"]}


def eight(rows: str, inputs: dict[str, Any]) -> dict[str, Any]:
    """Weights in 8 bits, one scale for each output, and inputs."""
    weights = {"num_bits": 8, "type": "int", "strategy": rows}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {"config_groups": {"group_0": group}, "ignore": ["lm_head"]}


STATIC = {"num_bits": 8, "type": "int", "strategy": "tensor", "symmetric": False}
# Ranges are those of all that was seen; the default is a moving average.
CACHE = {
    **{"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True},
    **{"dynamic": False, "observer": "static_minmax"},
}
Recipe = Callable[[], list[Any]]
RECIPES: dict[str, Recipe] = {
    "w4": lambda: [QuantizationModifier(**integers(4))],
    "w4_asym": lambda: [QuantizationModifier(**integers(4, symmetric=False))],
    "w3": lambda: [QuantizationModifier(**integers(3))],
    "w8": lambda: [QuantizationModifier(**integers(8))],
    "w4_gptq": lambda: [GPTQModifier(**integers(4, actorder="weight"))],
    "w8a8": lambda: [QuantizationModifier(scheme="W8A8", **LINEARS)],
    "w8a8_smooth_gptq": lambda: [
        SmoothQuantModifier(smoothing_strength=0.8),
        GPTQModifier(scheme="W8A8", **LINEARS),
    ],
    "fp8": lambda: [QuantizationModifier(scheme="FP8", **LINEARS)],
    "fp8_dynamic": lambda: [QuantizationModifier(scheme="FP8_DYNAMIC", **LINEARS)],
    "nvfp4a16": lambda: [QuantizationModifier(scheme="NVFP4A16", **LINEARS)],
    "nvfp4": lambda: [QuantizationModifier(scheme="NVFP4", **LINEARS)],
    "mxfp4a16": lambda: [QuantizationModifier(scheme="MXFP4A16", **LINEARS)],
    "mxfp4": lambda: [QuantizationModifier(scheme="MXFP4", **LINEARS)],
    "mxfp8": lambda: [QuantizationModifier(scheme="MXFP8", **LINEARS)],
    "mixed": lambda: [QuantizationModifier(**mixed())],
    "w4_channel": lambda: [
        QuantizationModifier(**integers(4, strategy="channel", group_size=None))
    ],
    "w2": lambda: [QuantizationModifier(**integers(2))],
    "w4a8": lambda: [QuantizationModifier(scheme="W4A8", **LINEARS)],
    "w8a8_static": lambda: [QuantizationModifier(**eight("channel", STATIC))],
    "fp8_block": lambda: [QuantizationModifier(scheme="FP8_BLOCK", **LINEARS)],
    "fp8_cache": lambda: [
        QuantizationModifier(scheme="FP8_DYNAMIC", kv_cache_scheme=CACHE, **LINEARS)
    ],
}
CALIBRATED = (
    *("w4_gptq", "w8a8_smooth_gptq", "fp8", "nvfp4", "w8a8_static", "fp8_cache"),
)


def write(case: str, base: str, out: Path) -> None:
    """Quantize, keep the logits of the model that simulates it, and save."""
    model, words = float_model(base), tokenizer(base)
    options: dict[str, Any] = {}
    if case in CALIBRATED:
        rows = calibration(base)
        held = {"input_ids": rows.tolist(), "attention_mask": (rows >= 0).tolist()}
        options = {
            "dataset": Dataset.from_dict(held),
            "num_calibration_samples": len(rows),
            "max_seq_length": rows.shape[1],
            "shuffle_calibration_samples": False,
        }
    oneshot(model=model, processor=words, recipe=RECIPES[case](), **options)
    keep_logits(out, model, base)
    model.save_pretrained(out, save_compressed=True)


def main(base: str, out: str, *only: str) -> None:
    """Write the cases."""
    torch.manual_seed(0)
    cases = {f"llmcompressor-{name}": partial(write, name) for name in RECIPES}
    write_cases(base, out, cases, list(only))


if __name__ == "__main__":
    main(*sys.argv[1:])
