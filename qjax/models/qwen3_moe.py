"""Qwen3-MoE (Yang et al., 2025): Qwen3 whose MLPs are mixtures of experts."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from qjax.models import layers, llama, qwen3
from qjax.models.fields import Fields
from qjax.models.llama import PREFIX
from qjax.models.names import Name, linear_names

__all__ = ["PREFIX", "Config", "Qwen3MoE", "build", "from_fields", "names"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(llama.Config):
    """Qwen3's sizes and those of the experts.

    Attributes:
      experts: number of experts in a layer.
      chosen: how many of them see a token.
      expert_features: hidden features of one expert.
      renormalise: whether the chosen experts' weights are scaled to sum to 1.
      sparse: per layer, whether it has experts or a plain MLP.
    """

    experts: int
    chosen: int
    expert_features: int
    renormalise: bool
    sparse: tuple[bool, ...]


class Expert(nnx.Module):
    """One linear of every expert, `kernel[E, K, N]`."""

    def __init__(self, shape: tuple[int, int, int], *, dtype: Any, rngs: nnx.Rngs):
        init = nnx.initializers.normal(layers.INITIALIZER_RANGE)
        self.kernel = nnx.Param(init(rngs.params(), shape, dtype))

    def __call__(self, x: Float[Array, "R K"], sizes: Any) -> Float[Array, "R N"]:
        """Rows sorted by expert, `sizes[E]` rows for each."""
        return jax.lax.ragged_dot(x, self.kernel[...], sizes)


class Experts(nnx.Module):
    """The gated MLPs of all experts."""

    def __init__(self, config: Config, *, dtype: Any, rngs: nnx.Rngs):
        outer, inner = config.features, config.expert_features
        up, down = (config.experts, outer, inner), (config.experts, inner, outer)
        self.gate_proj = Expert(up, dtype=dtype, rngs=rngs)
        self.up_proj = Expert(up, dtype=dtype, rngs=rngs)
        self.down_proj = Expert(down, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "R D"], sizes: Any) -> Float[Array, "R D"]:
        """Rows sorted by expert, `sizes[E]` rows for each."""
        inner = jax.nn.silu(self.gate_proj(x, sizes)) * self.up_proj(x, sizes)
        return self.down_proj(inner, sizes)


class MoE(nnx.Module):
    """A router and experts; every token is seen by the few it scores highest."""

    def __init__(self, config: Config, *, dtype: Any, rngs: nnx.Rngs):
        self.config = config
        self.router = layers.linear(
            config.features, config.experts, bias=False, dtype=dtype, rngs=rngs
        )
        self.experts = Experts(config, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Apply to every token alone; no token is dropped."""
        tokens = x.reshape(-1, x.shape[-1])
        weights, experts = self.route(tokens)
        # Rows sorted by expert make each expert's share one contiguous matrix.
        order = jnp.argsort(experts.reshape(-1))
        owner = order // self.config.chosen
        sizes = jnp.bincount(experts.reshape(-1), length=self.config.experts)
        out = self.experts(tokens[owner], sizes.astype(jnp.int32))
        out = out * weights.reshape(-1)[order][:, None]
        return jnp.zeros_like(tokens).at[owner].add(out).reshape(x.shape)

    def route(self, tokens: Float[Array, "M D"]) -> tuple[Any, Any]:
        """The chosen experts of every token and their weights, both `[M, chosen]`."""
        scores = jax.nn.softmax(self.router(tokens).astype(jnp.float32), axis=-1)
        weights, experts = jax.lax.top_k(scores, self.config.chosen)
        if self.config.renormalise:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        return weights.astype(tokens.dtype), experts


class Block(llama.Block):
    """Qwen3's block with experts in the layers that have them."""

    def make_mlp(self, config: Any, index: int, *, dtype: Any, rngs: nnx.Rngs) -> Any:
        """The feed-forward part of layer `index`."""
        make = MoE if config.sparse[index] else llama.MLP
        return make(config, dtype=dtype, rngs=rngs)


class Qwen3MoE(llama.Llama):
    """Tokens to logits."""

    block = Block


def from_fields(fields: Fields) -> Config:
    """The configuration in a Hugging Face `config.json`."""
    base = qwen3.from_fields(fields)
    # transformers 5 writes the number of experts under its own name for it.
    count = "num_local_experts" if "num_local_experts" in fields.raw else "num_experts"
    experts, chosen = chosen_experts(fields, count, 8)
    step = fields.integer("decoder_sparse_step", 1)
    dense = fields.raw.get("mlp_only_layers") or ()
    # Unlike Qwen3, a window is for all layers.
    windowed = fields.flag("use_sliding_window", False)
    window = fields.integer("sliding_window", None) if windowed else None
    values: dict[str, Any] = {
        field.name: getattr(base, field.name) for field in dataclasses.fields(base)
    }
    values["windows"] = (window,) * base.layers
    return Config(
        **values,
        experts=experts,
        chosen=chosen,
        expert_features=fields.integer("moe_intermediate_size"),
        renormalise=fields.flag("norm_topk_prob", False),
        sparse=tuple(
            i not in dense and (i + 1) % step == 0 for i in range(base.layers)
        ),
    )


def chosen_experts(fields: Fields, count: str, default: int) -> tuple[int, int]:
    """How many experts there are, by the field `count`, and how many see a token."""
    experts = fields.integer(count)
    chosen = fields.integer("num_experts_per_tok", default)
    if chosen > experts:
        raise ValueError(
            f"config.json: num_experts_per_tok is {chosen}, expected at most {experts}"
        )
    return experts, chosen


def build(config: Config, *, scan_layers: bool = False, **options: Any) -> nnx.Module:
    """The model, with the options of `Llama`."""
    if scan_layers and len(set(config.sparse)) > 1:
        raise ValueError(
            "scan_layers needs layers of one kind, but mlp_only_layers or "
            "decoder_sparse_step mix plain and expert layers: use scan_layers=False"
        )
    return Qwen3MoE(config, scan_layers=scan_layers, **options)


def names(config: Config) -> tuple[Name, ...]:
    """The tensors of a Hugging Face checkpoint and the leaves they become."""
    hf, path = "model.layers.{layer}.mlp.", "layers/{layer}/mlp/"
    rows = [*llama.outer_names(config), *llama.attention_names(config)]
    rows += linear_names(hf + "gate", path + "router", False)
    for each in ("gate_proj", "up_proj", "down_proj"):
        expert = f"{hf}experts.{{expert}}.{each}.weight"
        rows.append(Name(expert, f"{path}experts/{each}/kernel", transpose=True))
    return (*rows, *(llama.mlp_names(config) if not all(config.sparse) else ()))
