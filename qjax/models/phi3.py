"""Phi-3 and Phi-4-mini (Abdin et al., 2024): Llama with fused linears and LongRoPE.

Queries, keys and values come from one linear, gate and up from another.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from qjax.models import layers, llama, rope
from qjax.models.fields import Fields
from qjax.models.llama import PREFIX
from qjax.models.names import Name, linear_names

__all__ = ["PREFIX", "Phi3", "build", "from_fields", "names"]

_ROPE = ("rope_parameters", "rope_scaling", "partial_rotary_factor")


class Attention(llama.Attention):
    """Llama's, with one linear for queries, keys and values."""

    def make_projections(self, config: Any, *, dtype: Any, rngs: nnx.Rngs) -> None:
        """The linears of the layer."""
        wide, narrow = (n * config.head_dim for n in (config.heads, config.kv_heads))

        def make(n_in, n_out):
            return layers.linear(n_in, n_out, bias=False, dtype=dtype, rngs=rngs)

        self.qkv_proj = make(config.features, wide + 2 * narrow)
        self.o_proj = make(wide, config.features)

    def project(self, x: Float[Array, "B T D"]) -> tuple[Any, Any, Any]:
        """Queries, keys and values, the heads side by side."""
        c = self.config
        ends = c.heads * c.head_dim, (c.heads + c.kv_heads) * c.head_dim
        q, k, v = jnp.split(self.qkv_proj(x), ends, axis=-1)
        return q, k, v


class MLP(nnx.Module):
    """The gated feed-forward layer with one linear for gate and up."""

    def __init__(self, config: Any, *, dtype: Any, rngs: nnx.Rngs):
        outer, inner = config.features, config.mlp_features
        self.activation = layers.ACTIVATIONS[config.activation]
        self.gate_up_proj = layers.linear(
            outer, 2 * inner, bias=False, dtype=dtype, rngs=rngs
        )
        self.down_proj = layers.linear(inner, outer, bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Apply to every token alone."""
        gate, up = jnp.split(self.gate_up_proj(x), 2, axis=-1)
        return self.down_proj(self.activation(gate) * up)


class Block(llama.Block):
    """Llama's block with fused linears."""

    attention = Attention

    def make_mlp(self, config: Any, index: int, *, dtype: Any, rngs: nnx.Rngs) -> Any:
        """The feed-forward part of layer `index`."""
        return MLP(config, dtype=dtype, rngs=rngs)


class Phi3(llama.Llama):
    """Tokens to logits."""

    block = Block


def from_fields(fields: Fields) -> llama.Config:
    """The configuration in a Hugging Face `config.json`."""
    fields = fields.filled(rms_norm_eps=1e-5, max_position_embeddings=4096)
    plain = Fields({k: v for k, v in fields.raw.items() if k not in _ROPE})
    config = llama.common(plain)
    window = fields.integer("sliding_window", None)
    return dataclasses.replace(
        config,
        rope=rope.from_fields(fields, config.head_dim, config.context, partial=True),
        windows=(window,) * config.layers,
    )


def build(config: llama.Config, **options: Any) -> nnx.Module:
    """The model, with the options of `Llama`."""
    return Phi3(config, **options)


def names(config: llama.Config) -> tuple[Name, ...]:
    """The tensors of a Hugging Face checkpoint and the leaves they become."""
    hf, path = "model.layers.{layer}.", "layers/{layer}/"
    rows = llama.outer_names(config)
    rows += linear_names(hf + "self_attn.qkv_proj", path + "attn/qkv_proj", False)
    rows += linear_names(hf + "self_attn.o_proj", path + "attn/o_proj", False)
    rows += linear_names(hf + "mlp.gate_up_proj", path + "mlp/gate_up_proj", False)
    rows += linear_names(hf + "mlp.down_proj", path + "mlp/down_proj", False)
    return tuple(rows)
