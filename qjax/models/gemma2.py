"""Gemma 2 (Gemma Team, 2024): norms by `1 + g` around every part, bounded scores.

Every other layer has a sliding window; the embedding, which is also the head, is
scaled by `sqrt(D)` where it is read.
"""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from qjax.models import layers, llama, rope
from qjax.models.fields import Fields, attention_kinds
from qjax.models.llama import PREFIX
from qjax.models.names import Name

__all__ = ["PREFIX", "Config", "Gemma2", "build", "common", "from_fields", "names"]

NORMS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "attn_out_norm",
    "pre_feedforward_layernorm": "mlp_norm",
    "post_feedforward_layernorm": "mlp_out_norm",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(llama.Config):
    """Llama's sizes and switches, and those of Gemma 2 and 3.

    Attributes:
      rope: the rotary frequencies of every layer.
      score_scale: multiplies the scores, `query_pre_attn_scalar ** -0.5`.
      score_cap, logit_cap: bounds of scores and logits; None: unbounded.
    """

    rope: Any
    score_scale: float
    score_cap: float | None = None
    logit_cap: float | None = None


class Attention(llama.Attention):
    """Llama's, with a scale of its own and bounded scores."""

    norm = layers.OffsetRMSNorm

    def __init__(self, config: Config, *, dtype: Any, rngs: nnx.Rngs):
        super().__init__(config, dtype=dtype, rngs=rngs)
        self.scale = config.score_scale
        self.attention = functools.partial(layers.attention, cap=config.score_cap)


class Block(nnx.Module):
    """Attention and MLP, each normed before and after, then added."""

    def __init__(self, config: Config, index: int, *, dtype: Any, rngs: nnx.Rngs):
        def norm():
            return layers.OffsetRMSNorm(config.features, config.epsilon, dtype=dtype)

        self.attn_norm, self.attn_out_norm = norm(), norm()
        self.attn = Attention(config, dtype=dtype, rngs=rngs)
        self.mlp_norm, self.mlp_out_norm = norm(), norm()
        self.mlp = llama.MLP(config, dtype=dtype, rngs=rngs)

    def __call__(self, x, kv, step, layer, window):
        """One layer; returns the activations and the updated cache."""
        out, kv = self.attn(self.attn_norm(x), kv, step, layer, window)
        x = x + self.attn_out_norm(out)
        return x + self.mlp_out_norm(self.mlp(self.mlp_norm(x))), kv


class Gemma2(llama.Llama):
    """Tokens to logits."""

    block = Block
    final_norm = layers.OffsetRMSNorm

    def embedded(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Rows of the embedding times `sqrt(D)`, which is rounded to their dtype."""
        x = self.embed(tokens)
        return x * jnp.asarray(self.config.features**0.5, x.dtype)

    def logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """The head, bounded."""
        return layers.soft_cap(super().logits(x), self.config.logit_cap)


def from_fields(fields: Fields) -> Config:
    """The configuration in a Hugging Face `config.json`."""
    fields = _capped(fields)
    config = common(fields, tuple(i % 2 == 0 for i in range(_layers(fields))))
    return dataclasses.replace(
        config, score_cap=fields.number("attn_logit_softcapping", None)
    )


def _layers(fields: Fields) -> int:
    return fields.integer("num_hidden_layers")


def _capped(fields: Fields) -> Fields:
    """With the bounds of the paper where the fields are absent; null is no bound."""
    bounds = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    return Fields({**bounds, **fields.raw})


def common(fields: Fields, sliding: tuple[bool, ...]) -> Config:
    """What Gemma 2 and 3 say in the same fields.

    Args:
      fields: the configuration.
      sliding: which layers have a window where the fields do not say.
    """
    fields.require("use_bidirectional_attention", False)
    raw = {name: x for name, x in fields.raw.items() if name != "hidden_act"}
    base = llama.common(Fields(raw).filled(head_dim=256, tie_word_embeddings=True))
    values = {
        field.name: getattr(base, field.name) for field in dataclasses.fields(base)
    }
    bias = fields.flag("attention_bias", False)
    window = fields.integer("sliding_window", 4096)
    kinds = attention_kinds(fields, sliding)
    values |= {
        "rope": rope.PerLayer((base.rope,), (0,) * base.layers),
        "qkv_bias": bias,
        "out_bias": bias,
        "windows": tuple(window if each else None for each in kinds),
        "activation": fields.choice(
            "hidden_activation", tuple(layers.ACTIVATIONS), "gelu_pytorch_tanh"
        ),
    }
    return Config(
        **values,
        score_scale=float(fields.number("query_pre_attn_scalar", 256)) ** -0.5,
        logit_cap=fields.number("final_logit_softcapping", None),
    )


def build(config: Config, **options: Any) -> nnx.Module:
    """The model, with the options of `Llama`."""
    return Gemma2(config, **options)


def names(config: Config) -> tuple[Name, ...]:
    """The tensors of a Hugging Face checkpoint and the leaves they become."""
    outer = llama.outer_names(config, NORMS)
    return (*outer, *llama.attention_names(config), *llama.mlp_names(config))
