"""Llama 1, 2 and 3 (Touvron et al., 2023; Grattafiori et al., 2024).

The block of Mistral, Qwen2 and Qwen3 too: they differ in a bias, a norm or a window,
which are fields of `Config`. Gemma, Mixtral and Phi-3 replace parts of it.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from qjax.models import layers, rope
from qjax.models.fields import Fields, head_sizes
from qjax.models.names import Name, linear_names


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and switches; the names are the words of the papers.

    Attributes:
      vocabulary, features, mlp_features, layers, heads, kv_heads, head_dim: sizes.
      context: the longest sequence it was made for, in tokens.
      epsilon: added to the mean square in RMSNorm.
      rope: the rotary frequencies.
      tied: whether the embedding is also the head.
      qkv_bias, out_bias, mlp_bias: which linears have a bias.
      qk_norm: RMSNorm on the heads of queries and keys (Qwen3).
      activation: of the MLP's gate, a key of `layers.ACTIVATIONS`.
      windows: per layer, how many tokens back a query sees; None sees all.
      coded_cache: whether keys and values are rounded to float8 on scales of the layer.
    """

    vocabulary: int
    features: int
    mlp_features: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int
    epsilon: float
    rope: rope.Rope
    tied: bool
    windows: tuple[int | None, ...]
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    activation: str = "silu"
    coded_cache: bool = False


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions."""

    norm: Any = layers.RMSNorm

    def __init__(self, config: Any, *, dtype: Any, rngs: nnx.Rngs):
        self.config = config
        self.attention, self.scale = layers.attention, config.head_dim**-0.5
        self.make_projections(config, dtype=dtype, rngs=rngs)
        if config.qk_norm:
            self.q_norm = self.norm(config.head_dim, config.epsilon, dtype=dtype)
            self.k_norm = self.norm(config.head_dim, config.epsilon, dtype=dtype)
        if config.coded_cache:
            self.k_scale = nnx.Param(jnp.ones((1,), jnp.float32))
            self.v_scale = nnx.Param(jnp.ones((1,), jnp.float32))

    def make_projections(self, config: Any, *, dtype: Any, rngs: nnx.Rngs) -> None:
        """The linears of the layer."""
        wide, narrow = (n * config.head_dim for n in (config.heads, config.kv_heads))

        def make(n_in, n_out, bias):
            return layers.linear(n_in, n_out, bias=bias, dtype=dtype, rngs=rngs)

        self.q_proj = make(config.features, wide, config.qkv_bias)
        self.k_proj = make(config.features, narrow, config.qkv_bias)
        self.v_proj = make(config.features, narrow, config.qkv_bias)
        self.o_proj = make(wide, config.features, config.out_bias)

    def project(self, x: Float[Array, "B T D"]) -> tuple[Any, Any, Any]:
        """Queries, keys and values, the heads side by side."""
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def __call__(self, x, kv, step, layer, window):
        """Attend; returns the output and the updated cache."""
        c = self.config
        q, k, v = self.project(x)
        q = layers.split_heads(q, c.heads)
        k, v = layers.split_heads(k, c.kv_heads), layers.split_heads(v, c.kv_heads)
        if c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        rope = c.rope.of_layer(layer)
        q, k = rope.rotate(q, step.positions), rope.rotate(k, step.positions)
        if c.coded_cache:
            k = layers.in_float8(k, self.k_scale[...])
            v = layers.in_float8(v, self.v_scale[...])
        by, scale = self.attention, self.scale
        out, kv = layers.attend(q, k, v, kv, layer, step, window, scale, by)
        return self.o_proj(out), kv


class MLP(nnx.Module):
    """The gated feed-forward layer, `down(f(gate(x)) * up(x))`."""

    def __init__(self, config: Config, *, dtype: Any, rngs: nnx.Rngs):
        self.activation = layers.ACTIVATIONS[config.activation]

        def make(n_in, n_out):
            return layers.linear(
                n_in, n_out, bias=config.mlp_bias, dtype=dtype, rngs=rngs
            )

        self.gate_proj = make(config.features, config.mlp_features)
        self.up_proj = make(config.features, config.mlp_features)
        self.down_proj = make(config.mlp_features, config.features)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Apply to every token alone."""
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class Block(nnx.Module):
    """Attention and MLP, each normed before and added after."""

    attention: Any = Attention

    def __init__(self, config: Any, index: int, *, dtype: Any, rngs: nnx.Rngs):
        self.attn_norm = layers.RMSNorm(config.features, config.epsilon, dtype=dtype)
        self.attn = self.attention(config, dtype=dtype, rngs=rngs)
        self.mlp_norm = layers.RMSNorm(config.features, config.epsilon, dtype=dtype)
        self.mlp = self.make_mlp(config, index, dtype=dtype, rngs=rngs)

    def make_mlp(self, config: Any, index: int, *, dtype: Any, rngs: nnx.Rngs) -> Any:
        """The feed-forward part of layer `index`."""
        return MLP(config, dtype=dtype, rngs=rngs)

    def __call__(self, x, kv, step, layer, window):
        """One layer; returns the activations and the updated cache."""
        out, kv = self.attn(self.attn_norm(x), kv, step, layer, window)
        x = x + out
        return x + self.mlp(self.mlp_norm(x)), kv


class Llama(nnx.Module):
    """Tokens to logits."""

    block: Any = Block
    final_norm: Any = layers.RMSNorm

    def __init__(
        self,
        config: Any,
        *,
        rngs: nnx.Rngs,
        dtype: Any = jnp.float32,
        scan_layers: bool = False,
        remat: bool = False,
    ):
        self.config, self.remat = config, remat
        self.embed = layers.embedding(
            config.vocabulary, config.features, dtype=dtype, rngs=rngs
        )
        self.layers = layers.make_layers(
            lambda index, rngs: self.block(config, index, dtype=dtype, rngs=rngs),
            config.layers,
            rngs,
            scan_layers,
        )
        self.norm = self.final_norm(config.features, config.epsilon, dtype=dtype)
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
        x, cache = self.hidden(tokens, cache, positions=positions, mask=mask)
        logits = self.logits(x)
        return logits if cache is None else (logits, cache)

    def embedded(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """What the first layer sees."""
        return self.embed(tokens)

    def logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """The head."""
        if self.config.tied:
            return layers.tied_head(x, self.embed)
        return self.lm_head(x)

    def hidden(self, tokens, cache=None, *, positions=None, mask=None):
        """What the head sees, `[B, T, D]`, and the cache."""
        step, cache = layers.begin(tokens, cache, positions, mask)
        x, cache = layers.decode(
            self, self.embedded(tokens), step, cache, self.config.windows
        )
        return self.norm(x), cache

    def init_cache(self, batch: int, length: int, dtype: Any) -> layers.Cache:
        """An empty cache with room for `length` tokens."""
        c = self.config
        return layers.init_cache(c.layers, batch, length, c.kv_heads, c.head_dim, dtype)


PREFIX = "model."


def from_fields(fields: Fields) -> Config:
    """The configuration in a Hugging Face `config.json`."""
    bias = fields.flag("attention_bias", False)
    return dataclasses.replace(
        common(fields),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=fields.flag("mlp_bias", False),
    )


def common(fields: Fields) -> Config:
    """What models of this kind say in the same fields."""
    fields.choice("hidden_act", ("silu",), "silu")
    heads, kv_heads, head_dim = head_sizes(fields)
    context = fields.integer("max_position_embeddings", 2048)
    layer_count = fields.integer("num_hidden_layers")
    return Config(
        vocabulary=fields.integer("vocab_size"),
        features=fields.integer("hidden_size"),
        mlp_features=fields.integer("intermediate_size"),
        layers=layer_count,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        context=context,
        epsilon=float(fields.number("rms_norm_eps", 1e-6)),
        rope=rope.from_fields(fields, head_dim, context),
        tied=fields.flag("tie_word_embeddings", False),
        windows=(None,) * layer_count,
    )


def build(config: Config, **options: Any) -> nnx.Module:
    """The model, with the options of `Llama`."""
    return Llama(config, **options)


def names(config: Config) -> tuple[Name, ...]:
    """The tensors of a Hugging Face checkpoint and the leaves they become."""
    return (*outer_names(config), *attention_names(config), *mlp_names(config))


NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "mlp_norm"}


def outer_names(config: Config, norms: Mapping[str, str] = NORMS) -> list[Name]:
    """Embedding, norms, the scales of a coded cache, and head."""
    rows = [
        Name("model.embed_tokens.weight", "embed/embedding"),
        Name("model.norm.weight", "norm/scale"),
    ]
    for hf, own in norms.items():
        rows.append(
            Name(f"model.layers.{{layer}}.{hf}.weight", f"layers/{{layer}}/{own}/scale")
        )
    for each in ("k_scale", "v_scale") if config.coded_cache else ():
        hf, path = "model.layers.{layer}.self_attn.", "layers/{layer}/attn/"
        rows.append(Name(hf + each, path + each))
    return rows if config.tied else rows + linear_names("lm_head", "lm_head", False)


def attention_names(config: Config) -> list[Name]:
    """The four projections, and Qwen3's norms."""
    rows: list[Name] = []
    hf, path = "model.layers.{layer}.self_attn.", "layers/{layer}/attn/"
    for each in ("q_proj", "k_proj", "v_proj", "o_proj"):
        bias = config.out_bias if each == "o_proj" else config.qkv_bias
        rows += linear_names(hf + each, path + each, bias)
    for each in ("q_norm", "k_norm") if config.qk_norm else ():
        rows.append(Name(f"{hf}{each}.weight", f"{path}{each}/scale"))
    return rows


def mlp_names(config: Config) -> list[Name]:
    """The three projections of the gated MLP."""
    hf, path = "model.layers.{layer}.mlp.", "layers/{layer}/mlp/"
    rows: list[Name] = []
    for each in ("gate_proj", "up_proj", "down_proj"):
        rows += linear_names(hf + each, path + each, config.mlp_bias)
    return rows
