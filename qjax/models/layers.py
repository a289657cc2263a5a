"""What the architectures share: norms, rotary positions, attention, the KV cache.

Shapes use `B` sequences, `T` new tokens, `S` key slots (`T` without a cache), `H`
query heads, `G` key-value heads, `d` features of a head, `D` of the model, `L` layers.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from qjax.core.formats import Float as FloatFormat
from qjax.core.formats import tensor
from qjax.core.qtensor import Activation, SiteActs
from qjax.ops import kv_cache
from qjax.ops.activations import coded_values
from qjax.ops.attention import attend_seen

INITIALIZER_RANGE = 0.02
FLOAT8 = Activation(FloatFormat("e4m3", tensor()), dynamic=False)


class Cache(NamedTuple):
    """Keys and values of the tokens seen so far; slots `[0, length)` are filled.

    Attributes:
      k, v: `[L, B, S, G, d]`, as `qjax.ops.kv_cache` keeps them.
      valid: `[B, S]`, False for empty slots and for padding.
      length: number of slots written, a scalar.
    """

    k: Any
    v: Any
    valid: Any
    length: Any


class Step(NamedTuple):
    """What every layer needs to know about the tokens of one call.

    Attributes:
      positions: `[B, T]`, counted from 0 at the first token that is not padding.
      slots: `[T]`, where the tokens stand in the cache.
      valid: `[B, S]`, the key slots that may be attended to.
    """

    positions: Any
    slots: Any
    valid: Any


def init_cache(
    layers: int, batch: int, length: int, heads: int, head_dim: int, dtype: Any
) -> Cache:
    """An empty cache with room for `length` tokens; int8 keeps codes and scales."""
    shape = (layers, batch, length, heads, head_dim)
    return Cache(
        k=kv_cache.empty(shape, dtype),
        v=kv_cache.empty(shape, dtype),
        valid=jnp.zeros((batch, length), bool),
        length=jnp.zeros((), jnp.int32),
    )


def begin(
    tokens: Int[Array, "B T"],
    cache: Cache | None,
    positions: Int[Array, "B T"] | None,
    mask: Bool[Array, "B T"] | None,
) -> tuple[Step, Cache | None]:
    """The step for these tokens, and the cache with their slots marked as filled."""
    mask = jnp.ones(tokens.shape, bool) if mask is None else mask
    start = jnp.zeros((), jnp.int32) if cache is None else cache.length
    if positions is None:
        seen = jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1
        if cache is not None:
            seen += jnp.sum(cache.valid, axis=1, dtype=jnp.int32, keepdims=True)
        positions = jnp.maximum(seen, 0)
    slots = start + jnp.arange(tokens.shape[1], dtype=jnp.int32)
    if cache is None:
        return Step(positions, slots, mask), None
    valid = jax.lax.dynamic_update_slice(cache.valid, mask, (0, start))
    cache = cache._replace(valid=valid, length=start + tokens.shape[1])
    return Step(positions, slots, valid), cache


def remember(
    kv: tuple[Any, Any] | None, layer: Any, step: Step, k: Any, v: Any
) -> tuple[Any, Any, tuple[Any, Any] | None]:
    """Keys and values to attend to: the new ones, after the cached ones if any.

    The new ones are named "keys" and "values", as a cache stores them.
    """
    k, v = checkpoint_name(k, "keys"), checkpoint_name(v, "values")
    if kv is None:
        return k, v, None
    keys, values = _written(kv, layer, step, k, v)
    k = kv_cache.read(keys, layer, k.dtype)
    v = kv_cache.read(values, layer, v.dtype)
    return k, v, (keys, values)


def _written(
    kv: tuple[Any, Any], layer: Any, step: Step, k: Any, v: Any
) -> tuple[Any, Any]:
    """The cache with new keys and values in the slots of the step."""
    keys, values = (
        kv_cache.write(old, jnp.asarray(layer, jnp.int32), step.slots[0], new)
        for old, new in zip(kv, (k, v), strict=True)
    )
    return keys, values


def in_float8(x: Float[Array, "B T G d"], scale: Float[Array, " 1"]) -> Any:
    """`x` rounded to float8 (e4m3) times `scale`, with the gradient of the identity."""
    rows = x.reshape(-1, x.shape[-1])
    acts = SiteActs(scale.reshape(1, 1), activation=FLOAT8)
    return coded_values(rows, acts).reshape(x.shape)


def causal_mask(step: Step, window: Any = None) -> Bool[Array, "B T S"]:
    """True where a query may see a key: not later, not padding, inside `window`."""
    keys = jnp.arange(step.valid.shape[1], dtype=jnp.int32)
    distance = step.slots[:, None] - keys[None, :]
    visible = distance >= 0
    if window is not None:
        visible &= distance < window
    return visible[None] & step.valid[:, None, :]


def attention(
    q: Float[Array, "B T H d"],
    k: Float[Array, "B S G d"],
    v: Float[Array, "B S G d"],
    mask: Bool[Array, "B T S"],
    scale: float,
    cap: float | None = None,
) -> Float[Array, "B T Hd"]:
    """Softmax attention in which `H / G` query heads share a key-value head.

    `cap` bounds the scores by `soft_cap`. What meets keys and values is named "queries"
    and "attention".
    """
    b, t, h, d = q.shape
    q = checkpoint_name(q, "queries")
    q = q.reshape(b, t, k.shape[2], h // k.shape[2], d)
    scores = jnp.einsum("btgqd,bsgd->bgqts", q, k, preferred_element_type=jnp.float32)
    scores = soft_cap(scores * scale, cap)
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    weights = checkpoint_name(weights, "attention")
    return jnp.einsum("bgqts,bsgd->btgqd", weights, v).reshape(b, t, h * d)


def soft_cap(x: Any, cap: float | None) -> Any:
    """`cap * tanh(x / cap)`, which stays between -cap and cap; None changes nothing."""
    return x if cap is None else jnp.tanh(x / cap) * cap


def attend(
    q: Float[Array, "B T H d"],
    k: Float[Array, "B T G d"],
    v: Float[Array, "B T G d"],
    kv: tuple[Any, Any] | None,
    layer: Any,
    step: Step,
    window: Any,
    scale: float,
    by: Callable[..., Any] = attention,
) -> tuple[Float[Array, "B T Hd"], tuple[Any, Any] | None]:
    """Attention to what was seen, and the cache with the new keys and values.

    One new token meets the codes of a coded cache as they are; the weights of the codes
    have no name. More tokens, and another attention than the plain one, meet the values
    that codes stand for.
    """
    one = q.shape[1] == 1 and by is attention
    if kv is not None and one and isinstance(kv[0], kv_cache.CodedCache):
        q = checkpoint_name(q, "queries")
        k, v = checkpoint_name(k, "keys"), checkpoint_name(v, "values")
        keys, values = _written(kv, layer, step, k, v)
        seen = causal_mask(step, window)[:, 0]
        out = attend_seen(
            q[:, 0], keys.layer(layer), values.layer(layer), seen, scale=scale
        )
        return out.reshape(*q.shape[:2], -1), (keys, values)
    k, v, kv = remember(kv, layer, step, k, v)
    return by(q, k, v, causal_mask(step, window), scale), kv


class RMSNorm(nnx.Module):
    """`x / rms(x) * scale`, computed in float32."""

    def __init__(self, features: int, epsilon: float, *, dtype: Any):
        self.scale = nnx.Param(jnp.ones((features,), dtype))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*S D"]) -> Float[Array, "*S D"]:
        """Normalise the last axis."""
        wide = x.astype(jnp.float32)
        power = jnp.mean(wide * wide, axis=-1, keepdims=True)
        normed = wide * jax.lax.rsqrt(power + self.epsilon)
        return normed.astype(x.dtype) * self.scale[...].astype(x.dtype)


class OffsetRMSNorm(nnx.Module):
    """`x / rms(x) * (1 + scale)`, computed in float32: Gemma's."""

    def __init__(self, features: int, epsilon: float, *, dtype: Any):
        self.scale = nnx.Param(jnp.zeros((features,), dtype))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*S D"]) -> Float[Array, "*S D"]:
        """Normalise the last axis."""
        wide = x.astype(jnp.float32)
        power = jnp.mean(wide * wide, axis=-1, keepdims=True)
        normed = wide * jax.lax.rsqrt(power + self.epsilon)
        return (normed * (1.0 + self.scale[...].astype(jnp.float32))).astype(x.dtype)


def linear(
    inputs: int, outputs: int, *, bias: bool, dtype: Any, rngs: nnx.Rngs
) -> nnx.Linear:
    """A linear layer `x @ kernel[K, N] (+ bias[N])` with GPT-2's initialisation."""
    return nnx.Linear(
        inputs,
        outputs,
        use_bias=bias,
        param_dtype=dtype,
        kernel_init=nnx.initializers.normal(INITIALIZER_RANGE),
        rngs=rngs,
    )


def embedding(rows: int, features: int, *, dtype: Any, rngs: nnx.Rngs) -> nnx.Embed:
    """An embedding table `[rows, features]`; its rows have the table's own dtype."""
    table = nnx.Embed(
        rows,
        features,
        param_dtype=dtype,
        embedding_init=nnx.initializers.normal(INITIALIZER_RANGE),
        rngs=rngs,
    )
    # nnx.Embed would go on converting to the dtype of the day it was built.
    table.dtype = None
    return table


def tied_head(x: Float[Array, "B T D"], table: nnx.Embed) -> Float[Array, "B T V"]:
    """Logits from the embedding table, contracted without transposing it."""
    return jax.lax.dot_general(x, table.embedding[...], (((2,), (1,)), ((), ())))


def layer_norm(
    features: int, epsilon: float, *, dtype: Any, rngs: nnx.Rngs
) -> nnx.LayerNorm:
    """A layer norm with scale and bias, its statistics in float32."""
    return nnx.LayerNorm(
        features,
        epsilon=epsilon,
        param_dtype=dtype,
        use_fast_variance=False,
        rngs=rngs,
    )


def split_heads(x: Float[Array, "B T Hd"], heads: int) -> Float[Array, "B T H d"]:
    """Features as heads."""
    return x.reshape(*x.shape[:2], heads, -1)


class MLP(nnx.Module):
    """Two linears with biases and an activation between, `down(f(up(x)))`."""

    def __init__(
        self,
        features: int,
        inner: int,
        activation: Callable[[Any], Any],
        *,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        self.up_proj = linear(features, inner, bias=True, dtype=dtype, rngs=rngs)
        self.down_proj = linear(inner, features, bias=True, dtype=dtype, rngs=rngs)
        self.activation = activation

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Apply to every token alone."""
        return self.down_proj(self.activation(self.up_proj(x)))


ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


def make_layers(
    make: Callable[[int, nnx.Rngs], nnx.Module],
    count: int,
    rngs: nnx.Rngs,
    scan: bool,
) -> Any:
    """`count` blocks: a list, or one block whose leaves have a leading layer axis.

    `make(index, rngs)` makes one; scanned blocks are all made as the first.
    """
    if not scan:
        return nnx.List([make(index, rngs) for index in range(count)])
    first = functools.partial(make, 0)
    return nnx.split_rngs(splits=count)(nnx.vmap(first))(rngs)


def decode(
    model: Any, x: Float[Array, "B T D"], step: Step, cache: Cache | None, windows: Any
) -> tuple[Float[Array, "B T D"], Cache | None]:
    """Run a decoder's `layers`; the cache comes back with the new keys and values."""
    kv = None if cache is None else (cache.k, cache.v)
    x, kv = run_layers(model.layers, x, kv, step, windows, model.remat)
    if cache is None or kv is None:
        return x, None
    return x, cache._replace(k=kv[0], v=kv[1])


def run_layers(
    layers: Any,
    x: Float[Array, "B T D"],
    kv: tuple[Any, Any] | None,
    step: Step,
    windows: Sequence[int | None],
    remat: bool = False,
) -> tuple[Float[Array, "B T D"], tuple[Any, Any] | None]:
    """Apply the blocks in turn, by `lax.scan` when their leaves are stacked.

    A block is called as `block(x, kv, step, layer, window) -> (x, kv)`.
    """
    if isinstance(layers, nnx.List):
        for index, (block, window) in enumerate(zip(layers, windows, strict=True)):
            x, kv = _checkpoint(block, remat)(x, kv, step, index, window)
        return x, kv

    graph, state = nnx.split(layers)
    same = len(set(windows)) == 1

    def body(carry, xs):
        leaves, index, window = xs
        block = _checkpoint(nnx.merge(graph, leaves), remat)
        return block(*carry, step, index, windows[0] if same else window), None

    count = len(windows)
    limits = np.array([w or np.iinfo(np.int32).max for w in windows], np.int32)
    per_layer = (state, jnp.arange(count, dtype=jnp.int32), jnp.asarray(limits))
    return jax.lax.scan(body, (x, kv), per_layer)[0]


def _checkpoint(block: nnx.Module, remat: bool) -> Callable[..., Any]:
    """The block as a function, recomputed in the backward pass if `remat`."""
    if not remat:
        return block
    graph, state = nnx.split(block)

    def call(state, x, kv, step, layer, window):
        return nnx.merge(graph, state)(x, kv, step, layer, window)

    def recomputed(x, kv, step, layer, window):
        if isinstance(window, int) or window is None:

            def plain(s, x, kv, step, layer):
                return call(s, x, kv, step, layer, window)

            return jax.checkpoint(plain)(state, x, kv, step, layer)
        return jax.checkpoint(call)(state, x, kv, step, layer, window)

    return recomputed
