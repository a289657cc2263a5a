"""BERT (Devlin et al., 2018), the encoder, with or without its masked-token head."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from qjax.models import layers
from qjax.models.fields import Fields, split_heads
from qjax.models.names import Name, linear_names, norm_names

PREFIX = "bert."


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and switches.

    Attributes:
      segments: number of kinds of segment, `token_type_ids`.
      masked_head: whether the model gives logits (`BertForMaskedLM`), whose head is
        the embedding, or the last activations (`BertModel`).
    """

    vocabulary: int
    features: int
    mlp_features: int
    layers: int
    heads: int
    head_dim: int
    context: int
    segments: int
    epsilon: float
    activation: str
    masked_head: bool


class Attention(nnx.Module):
    """Attention of every token to every token that is not padding."""

    def __init__(self, config: Config, *, dtype: Any, rngs: nnx.Rngs):
        self.config = config

        def make():
            return layers.linear(
                config.features, config.features, bias=True, dtype=dtype, rngs=rngs
            )

        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (make() for _ in range(4))

    def __call__(
        self, x: Float[Array, "B T D"], valid: Bool[Array, "B T"]
    ) -> Float[Array, "B T D"]:
        """Attend."""
        c = self.config
        q = layers.split_heads(self.q_proj(x), c.heads)
        k = layers.split_heads(self.k_proj(x), c.heads)
        v = layers.split_heads(self.v_proj(x), c.heads)
        mask = jnp.broadcast_to(valid[:, None], (*valid.shape, valid.shape[1]))
        return self.o_proj(layers.attention(q, k, v, mask, c.head_dim**-0.5))


class Block(nnx.Module):
    """Attention and MLP, each added and then normed."""

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
        """One layer; an encoder keeps no cache."""
        x = self.attn_norm(x + self.attn(x, step.valid))
        return self.mlp_norm(x + self.mlp(x)), kv


class MaskedHead(nnx.Module):
    """A linear, a norm, and the embedding as the head, with a bias of its own."""

    def __init__(self, config: Config, *, dtype: Any, rngs: nnx.Rngs):
        n = config.features
        self.activation = layers.ACTIVATIONS[config.activation]
        self.proj = layers.linear(n, n, bias=True, dtype=dtype, rngs=rngs)
        self.norm = layers.layer_norm(n, config.epsilon, dtype=dtype, rngs=rngs)
        self.bias = nnx.Param(jnp.zeros((config.vocabulary,), dtype))

    def __call__(
        self, x: Float[Array, "B T D"], table: nnx.Embed
    ) -> Float[Array, "B T V"]:
        """Logits."""
        x = self.norm(self.activation(self.proj(x)))
        return layers.tied_head(x, table) + self.bias[...]


class Bert(nnx.Module):
    """Tokens to activations, or to logits of masked tokens."""

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
        self.segments = make(config.segments)
        self.embed_norm = layers.layer_norm(
            config.features, config.epsilon, dtype=dtype, rngs=rngs
        )
        self.layers = layers.make_layers(
            lambda index, rngs: Block(config, dtype=dtype, rngs=rngs),
            config.layers,
            rngs,
            scan_layers,
        )
        if config.masked_head:
            self.head = MaskedHead(config, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        *,
        positions: Int[Array, "B T"] | None = None,
        mask: Bool[Array, "B T"] | None = None,
        segments: Int[Array, "B T"] | None = None,
    ):
        """Last activations `[B, T, D]`, or logits `[B, T, V]` with the masked head.

        `mask` is False on padding, `segments` is 0 unless given.
        """
        if positions is None:
            places = jnp.arange(tokens.shape[1], dtype=jnp.int32)
            positions = jnp.broadcast_to(places, tokens.shape)
        segments = jnp.zeros_like(tokens) if segments is None else segments
        step, _ = layers.begin(tokens, None, positions, mask)
        x = self.embed(tokens) + self.positions(positions) + self.segments(segments)
        x, _ = layers.decode(
            self, self.embed_norm(x), step, None, (None,) * self.config.layers
        )
        return self.head(x, self.embed) if self.config.masked_head else x


def from_fields(fields: Fields) -> Config:
    """The configuration in a Hugging Face `config.json`."""
    fields.require("is_decoder", False)
    fields.require("add_cross_attention", False)
    fields.require("position_embedding_type", "absolute")
    features = fields.integer("hidden_size")
    heads = fields.integer("num_attention_heads")
    masked = "BertForMaskedLM" in (fields.raw.get("architectures") or ())
    if masked:
        fields.require("tie_word_embeddings", True)
    return Config(
        vocabulary=fields.integer("vocab_size"),
        features=features,
        mlp_features=fields.integer("intermediate_size"),
        layers=fields.integer("num_hidden_layers"),
        heads=heads,
        head_dim=split_heads("hidden_size", features, "num_attention_heads", heads),
        context=fields.integer("max_position_embeddings"),
        segments=fields.integer("type_vocab_size", 2),
        epsilon=float(fields.number("layer_norm_eps", 1e-12)),
        activation=fields.choice("hidden_act", tuple(layers.ACTIVATIONS), "gelu"),
        masked_head=masked,
    )


def build(config: Config, **options: Any) -> nnx.Module:
    """The model, with the options of `Bert`."""
    return Bert(config, **options)


def names(config: Config) -> tuple[Name, ...]:
    """The tensors of a Hugging Face checkpoint and the leaves they become."""
    outer, hf, path = (
        "bert.embeddings.",
        "bert.encoder.layer.{layer}.",
        "layers/{layer}/",
    )
    rows = [
        Name(outer + "word_embeddings.weight", "embed/embedding"),
        Name(outer + "position_embeddings.weight", "positions/embedding"),
        Name(outer + "token_type_embeddings.weight", "segments/embedding"),
        *norm_names(outer + "LayerNorm", "embed_norm"),
        *linear_names(hf + "attention.self.query", path + "attn/q_proj", True),
        *linear_names(hf + "attention.self.key", path + "attn/k_proj", True),
        *linear_names(hf + "attention.self.value", path + "attn/v_proj", True),
        *linear_names(hf + "attention.output.dense", path + "attn/o_proj", True),
        *norm_names(hf + "attention.output.LayerNorm", path + "attn_norm"),
        *linear_names(hf + "intermediate.dense", path + "mlp/up_proj", True),
        *linear_names(hf + "output.dense", path + "mlp/down_proj", True),
        *norm_names(hf + "output.LayerNorm", path + "mlp_norm"),
    ]
    if config.masked_head:
        head = "cls.predictions.transform."
        rows += linear_names(head + "dense", "head/proj", True)
        rows += norm_names(head + "LayerNorm", "head/norm")
        rows.append(Name("cls.predictions.bias", "head/bias"))
    return tuple(rows)
