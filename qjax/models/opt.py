"""OPT (Zhang et al., 2022)."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Int

from qjax.models import layers
from qjax.models.fields import Fields, split_heads
from qjax.models.names import Name, linear_names, norm_names

PREFIX = "model."
EPSILON = 1e-5
# The table of positions begins with two rows that are never used.
POSITION_OFFSET = 2


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and switches.

    Attributes:
      embedding_features: width of the embedding; other than `features` in OPT-350m,
        which then has linears in and out.
      norm_first: whether norms come before attention and MLP, or after the sums.
      final_norm: whether the last activations are normed.
    """

    vocabulary: int
    features: int
    embedding_features: int
    mlp_features: int
    layers: int
    heads: int
    head_dim: int
    context: int
    activation: str
    norm_first: bool
    final_norm: bool
    tied: bool

    @property
    def projected(self) -> bool:
        """Whether linears stand between the embedding and the layers."""
        return self.embedding_features != self.features


class Attention(nnx.Module):
    """Attention in which every linear has a bias."""

    def __init__(self, config: Config, *, dtype: Any, rngs: nnx.Rngs):
        self.config = config

        def make():
            return layers.linear(
                config.features, config.features, bias=True, dtype=dtype, rngs=rngs
            )

        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (make() for _ in range(4))

    def __call__(self, x, kv, step, layer, window):
        """Attend; returns the output and the updated cache."""
        c = self.config
        q = layers.split_heads(self.q_proj(x), c.heads)
        k = layers.split_heads(self.k_proj(x), c.heads)
        v = layers.split_heads(self.v_proj(x), c.heads)
        scale = c.head_dim**-0.5
        out, kv = layers.attend(q, k, v, kv, layer, step, window, scale)
        return self.o_proj(out), kv


class Block(nnx.Module):
    """Attention and MLP, normed before, or after the sums."""

    def __init__(self, config: Config, *, dtype: Any, rngs: nnx.Rngs):
        def make_norm():
            return layers.layer_norm(config.features, EPSILON, dtype=dtype, rngs=rngs)

        self.norm_first = config.norm_first
        self.attn_norm, self.mlp_norm = make_norm(), make_norm()
        self.attn = Attention(config, dtype=dtype, rngs=rngs)
        activation = layers.ACTIVATIONS[config.activation]
        self.mlp = layers.MLP(
            config.features, config.mlp_features, activation, dtype=dtype, rngs=rngs
        )

    def __call__(self, x, kv, step, layer, window):
        """One layer; returns the activations and the updated cache."""
        if self.norm_first:
            out, kv = self.attn(self.attn_norm(x), kv, step, layer, window)
            x = x + out
            return x + self.mlp(self.mlp_norm(x)), kv
        out, kv = self.attn(x, kv, step, layer, window)
        x = self.attn_norm(x + out)
        return self.mlp_norm(x + self.mlp(x)), kv


class OPT(nnx.Module):
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

        def make(n_in, n_out):
            return layers.linear(n_in, n_out, bias=False, dtype=dtype, rngs=rngs)

        inner, outer = config.features, config.embedding_features
        rows = config.context + POSITION_OFFSET
        self.embed = layers.embedding(config.vocabulary, outer, dtype=dtype, rngs=rngs)
        self.positions = layers.embedding(rows, inner, dtype=dtype, rngs=rngs)
        self.layers = layers.make_layers(
            lambda index, rngs: Block(config, dtype=dtype, rngs=rngs),
            config.layers,
            rngs,
            scan_layers,
        )
        if config.projected:
            self.project_in, self.project_out = make(outer, inner), make(inner, outer)
        if config.final_norm:
            self.norm = layers.layer_norm(inner, EPSILON, dtype=dtype, rngs=rngs)
        if not config.tied:
            self.lm_head = make(outer, config.vocabulary)

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
        c = self.config
        step, cache = layers.begin(tokens, cache, positions, mask)
        x = self.embed(tokens)
        x = self.project_in(x) if c.projected else x
        x = x + self.positions(step.positions + POSITION_OFFSET)
        x, cache = layers.decode(self, x, step, cache, (None,) * c.layers)
        x = self.norm(x) if c.final_norm else x
        x = self.project_out(x) if c.projected else x
        logits = layers.tied_head(x, self.embed) if c.tied else self.lm_head(x)
        return logits if cache is None else (logits, cache)

    def init_cache(self, batch: int, length: int, dtype: Any) -> layers.Cache:
        """An empty cache with room for `length` tokens."""
        c = self.config
        return layers.init_cache(c.layers, batch, length, c.heads, c.head_dim, dtype)


def from_fields(fields: Fields) -> Config:
    """The configuration in a Hugging Face `config.json`."""
    fields.require("enable_bias", True)
    fields.require("layer_norm_elementwise_affine", True)
    features = fields.integer("hidden_size")
    heads = fields.integer("num_attention_heads")
    norm_first = fields.flag("do_layer_norm_before", True)
    return Config(
        vocabulary=fields.integer("vocab_size"),
        features=features,
        embedding_features=fields.integer("word_embed_proj_dim", features),
        mlp_features=fields.integer("ffn_dim"),
        layers=fields.integer("num_hidden_layers"),
        heads=heads,
        head_dim=split_heads("hidden_size", features, "num_attention_heads", heads),
        context=fields.integer("max_position_embeddings"),
        activation=fields.choice(
            "activation_function", tuple(layers.ACTIVATIONS), "relu"
        ),
        norm_first=norm_first,
        final_norm=norm_first and not fields.flag("_remove_final_layer_norm", False),
        tied=fields.flag("tie_word_embeddings", True),
    )


def build(config: Config, **options: Any) -> nnx.Module:
    """The model, with the options of `OPT`."""
    return OPT(config, **options)


def names(config: Config) -> tuple[Name, ...]:
    """The tensors of a Hugging Face checkpoint and the leaves they become."""
    outer, hf, path = (
        "model.decoder.",
        "model.decoder.layers.{layer}.",
        "layers/{layer}/",
    )
    rows = [
        Name(outer + "embed_tokens.weight", "embed/embedding"),
        Name(outer + "embed_positions.weight", "positions/embedding"),
        *norm_names(hf + "self_attn_layer_norm", path + "attn_norm"),
        *norm_names(hf + "final_layer_norm", path + "mlp_norm"),
        *linear_names(hf + "self_attn.out_proj", path + "attn/o_proj", True),
        *linear_names(hf + "fc1", path + "mlp/up_proj", True),
        *linear_names(hf + "fc2", path + "mlp/down_proj", True),
    ]
    for each in ("q_proj", "k_proj", "v_proj"):
        rows += linear_names(f"{hf}self_attn.{each}", f"{path}attn/{each}", True)
    for each in ("project_in", "project_out") if config.projected else ():
        rows += linear_names(outer + each, each, False)
    rows += norm_names(outer + "final_layer_norm", "norm") if config.final_norm else []
    rows += [] if config.tied else linear_names("lm_head", "lm_head", False)
    return tuple(rows)
