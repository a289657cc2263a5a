"""Qwen3 (Yang et al., 2025): Llama with RMSNorm on the heads of queries and keys."""

import dataclasses

from qjax.models import llama
from qjax.models.fields import Fields, layer_windows
from qjax.models.llama import PREFIX, build, names

__all__ = ["PREFIX", "build", "from_fields", "names"]


def from_fields(fields: Fields) -> llama.Config:
    """The configuration in a Hugging Face `config.json`."""
    config = llama.common(fields)
    bias = fields.flag("attention_bias", False)
    return dataclasses.replace(
        config,
        qk_norm=True,
        qkv_bias=bias,
        out_bias=bias,
        windows=layer_windows(fields, config.layers),
    )
