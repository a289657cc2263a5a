"""Mistral 7B (Jiang et al., 2023): Llama with a sliding attention window."""

import dataclasses

from qjax.models import llama
from qjax.models.fields import Fields
from qjax.models.llama import PREFIX, build, names

__all__ = ["PREFIX", "build", "from_fields", "names"]


def from_fields(fields: Fields) -> llama.Config:
    """The configuration in a Hugging Face `config.json`."""
    config = llama.common(fields)
    window = fields.integer("sliding_window", None)
    return dataclasses.replace(config, windows=(window,) * config.layers)
