"""Gemma 3, text only (Gemma Team, 2025): Gemma 2 with norms on queries and keys.

Five layers of six have a sliding window and a rope of their own; scores are unbounded.
"""

import dataclasses

from qjax.models import gemma2, rope
from qjax.models.fields import Fields, attention_kinds
from qjax.models.gemma2 import PREFIX, build, names

__all__ = ["PREFIX", "build", "from_fields", "names"]

THETA, WINDOWED_THETA = 1_000_000.0, 10_000.0


def from_fields(fields: Fields) -> gemma2.Config:
    """The configuration in a Hugging Face `config.json`."""
    # transformers reads this field and does not use it.
    fields.require("attn_logit_softcapping", None)
    period = fields.integer("sliding_window_pattern", 6)
    layers = fields.integer("num_hidden_layers")
    sliding = attention_kinds(
        fields, tuple((i + 1) % period != 0 for i in range(layers))
    )
    config = gemma2.common(_without_rope(fields), sliding)
    return dataclasses.replace(
        config,
        qk_norm=True,
        rope=_ropes(fields, sliding, config.head_dim, config.context),
    )


def _without_rope(fields: Fields) -> Fields:
    return Fields({k: v for k, v in fields.raw.items() if not k.startswith("rope_")})


def _ropes(
    fields: Fields, sliding: tuple[bool, ...], head_dim: int, context: int
) -> rope.PerLayer:
    """One for layers with a window and one for those without.

    Reads `rope_parameters` (transformers 5), whose keys are the kinds of layers, or
    `rope_theta`, `rope_scaling` (without a window) and `rope_local_base_freq`.
    """
    nested = fields.table("rope_parameters") or Fields({})
    full = nested.table("full_attention") or fields.table("rope_scaling") or Fields({})
    windowed = nested.table("sliding_attention") or Fields({})
    full = full.filled(rope_theta=fields.number("rope_theta", THETA))
    theta = fields.number("rope_local_base_freq", WINDOWED_THETA)
    tables = (full, windowed.filled(rope_theta=theta))
    return rope.PerLayer(
        tuple(rope.from_table(table, head_dim, context) for table in tables),
        tuple(int(each) for each in sliding),
    )
