"""Qwen2 and Qwen2.5 (Yang et al., 2024): Llama with biases on queries, keys, values.

Its upper layers may have a sliding window.
"""

import dataclasses

from qjax.models import llama
from qjax.models.fields import Fields, layer_windows
from qjax.models.llama import PREFIX, build, names

__all__ = ["PREFIX", "build", "from_fields", "names"]


def from_fields(fields: Fields) -> llama.Config:
    """The configuration in a Hugging Face `config.json`."""
    config = llama.common(fields)
    windows = layer_windows(fields, config.layers)
    return dataclasses.replace(config, qkv_bias=True, windows=windows)
