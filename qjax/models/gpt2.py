"""GPT-2 (Radford et al., 2019)."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Int

from qjax.models import layers
from qjax.models.fields import Fields, split_heads
from qjax.models.names import Name, norm_names

PREFIX = "transformer."


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes, the activation, and whether the embedding is the head."""

    vocabulary: int
    features: int
    mlp_features: int
    layers: int
    heads: int
    head_dim: int
    context: int
    epsilon: float
    activation: str
    tied: bool


class Attention(nnx.Module):
    """Attention whose queries, keys and values come from one linear."""

    def __init__(self, config: Config, *, dtype: Any, rngs: nnx.Rngs):
        self.config = config

        def make(n_out):
            return layers.linear(
                config.features, n_out, bias=True, dtype=dtype, rngs=rngs
            )

        self.qkv_proj = make(3 * config.features)
        self.o_proj = make(config.features)

    def __call__(self, x, kv, step, layer, window):
        """Attend; returns the output and the updated cache."""
        c = self.config
        parts = jnp.split(self.qkv_proj(x), 3, axis=-1)
        q, k, v = (layers.split_heads(part, c.heads) for part in parts)
        scale = c.head_dim**-0.5
        out, kv = layers.attend(q, k, v, kv, layer, step, window, scale)
        return self.o_proj(out), kv


class Block(nnx.Module):
    """Attention and MLP, each normed before and added after."""

    def __init__(self, config: Config, *, dtype: Any, rngs: nnx.Rngs):
        def make_norm():
            return layers.layer_norm(
                config.features, config.epsilon, dtype=dtype, rngs=rngs
            )

        self.attn_norm, self.mlp_norm = make_norm(), make_norm()
        self.attn = Attention(config, dtype=dtype, rngs=rngs)
        activation = layers.ACTIVATIONS[config.activation]
        self.mlp = layers.MLP(
            config.features, config.mlp_features, activation, dtype=dtype, rngs=rngs
        )

    def __call__(self, x, kv, step, layer, window):
        """One layer; returns the activations and the updated cache."""
        out, kv = self.attn(self.attn_norm(x), kv, step, layer, window)
        x = x + out
        return x + self.mlp(self.mlp_norm(x)), kv


class GPT2(nnx.Module):
    """Tokens to logits."""

    def __init__(
        self,
        config: Config,
        *,
        rngs: nnx.Rngs,
        dtype: Any = jnp.float32,
        scan_layers: bool = False,
        remat: bool = False,
    ):
        self.config, self.remat = config, remat

        def make(rows):
            return layers.embedding(rows, config.features, dtype=dtype, rngs=rngs)

        self.embed, self.positions = make(config.vocabulary), make(config.context)
        self.layers = layers.make_layers(
            lambda index, rngs: Block(config, dtype=dtype, rngs=rngs),
            config.layers,
            rngs,
            scan_layers,
        )
        self.norm = layers.layer_norm(
            config.features, config.epsilon, dtype=dtype, rngs=rngs
        )
        if not config.tied:
            self.lm_head = layers.linear(
                config.features, config.vocabulary, bias=False, dtype=dtype, rngs=rngs
            )

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        cache: layers.Cache | None = None,
        *,
        positions: Int[Array, "B T"] | None = None,
        mask: Bool[Array, "B T"] | None = None,
    ):
        """Logits `[B, T, V]`; with a cache, also the cache with these tokens in it.

        `mask` is False on padding; `positions` count the other tokens unless given.
        """
        step, cache = layers.begin(tokens, cache, positions, mask)
        x = self.embed(tokens) + self.positions(step.positions)
        x, cache = layers.decode(self, x, step, cache, (None,) * self.config.layers)
        x = self.norm(x)
        logits = (
            layers.tied_head(x, self.embed) if self.config.tied else self.lm_head(x)
        )
        return logits if cache is None else (logits, cache)

    def init_cache(self, batch: int, length: int, dtype: Any) -> layers.Cache:
        """An empty cache with room for `length` tokens."""
        c = self.config
        return layers.init_cache(c.layers, batch, length, c.heads, c.head_dim, dtype)


def from_fields(fields: Fields) -> Config:
    """The configuration in a Hugging Face `config.json`."""
    fields.require("scale_attn_weights", True)
    fields.require("scale_attn_by_inverse_layer_idx", False)
    fields.require("add_cross_attention", False)
    features, heads = fields.integer("n_embd"), fields.integer("n_head")
    return Config(
        vocabulary=fields.integer("vocab_size"),
        features=features,
        mlp_features=fields.integer("n_inner", 4 * features),
        layers=fields.integer("n_layer"),
        heads=heads,
        head_dim=split_heads("n_embd", features, "n_head", heads),
        context=fields.integer("n_positions"),
        epsilon=float(fields.number("layer_norm_epsilon", 1e-5)),
        activation=fields.choice(
            "activation_function", tuple(layers.ACTIVATIONS), "gelu_new"
        ),
        tied=fields.flag("tie_word_embeddings", True),
    )


def build(config: Config, **options: Any) -> nnx.Module:
    """The model, with the options of `GPT2`."""
    return GPT2(config, **options)


def names(config: Config) -> tuple[Name, ...]:
    """The tensors of a Hugging Face checkpoint and the leaves they become.

    GPT-2's linears are kept as `[in, out]` in the checkpoint too.
    """
    hf, path = "transformer.h.{layer}.", "layers/{layer}/"
    rows = [
        Name("transformer.wte.weight", "embed/embedding"),
        Name("transformer.wpe.weight", "positions/embedding"),
        *norm_names("transformer.ln_f", "norm"),
        *norm_names(hf + "ln_1", path + "attn_norm"),
        *norm_names(hf + "ln_2", path + "mlp_norm"),
    ]
    for theirs, ours in (
        ("attn.c_attn", "attn/qkv_proj"),
        ("attn.c_proj", "attn/o_proj"),
        ("mlp.c_fc", "mlp/up_proj"),
        ("mlp.c_proj", "mlp/down_proj"),
    ):
        rows.append(Name(f"{hf}{theirs}.weight", f"{path}{ours}/kernel"))
        rows.append(Name(f"{hf}{theirs}.bias", f"{path}{ours}/bias"))
    if not config.tied:
        rows.append(Name("lm_head.weight", "lm_head/kernel", transpose=True))
    return tuple(rows)
