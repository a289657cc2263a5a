"""Attention of new tokens to a coded cache: XLA's form and the kernels."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool
from jaxtyping import Float as Floats
from jaxtyping import Int as Ints

from qjax.ops.kernels import Choice, check_implementation, unfit_target
from qjax.ops.kv_cache import CodedCache
from qjax.ops.targets import Target, here
from qjax_kernels.kv_attention import Cached, pallas_tpu


def attend(
    q: Floats[Array, "B H d"],
    keys: CodedCache,
    values: CodedCache,
    start: Ints[Array, " B"],
    stop: Ints[Array, " B"],
    *,
    scale: float,
    implementation: str = "auto",
    target: Target | None = None,
) -> Floats[Array, "B H d"]:
    """Softmax attention of one new token of every sequence to one layer of a cache.

    Scales multiply scores and softmax's weights, so that codes are contracted as they
    are; products are accumulated in float32.

    Args:
      q: queries of `H` heads; `H / G` neighbours share a head of the cache.
      keys: one layer of a cache, `cache.layer(index)`: codes `[B, S, G, d]`.
      values: likewise.
      start: the first slot that a sequence sees: after padding, or inside a window.
      stop: the slot after the last; what sees no slot gets 0.
      scale: of the scores, `d ** -0.5` mostly.
      implementation: "auto": a Pallas kernel where one suits, else XLA; "xla"; or
        "pallas": a kernel or an error.
      target: hardware to choose for; default this process's.

    Raises:
      ValueError: unknown implementation, or no kernel for "pallas".
    """
    target = here() if target is None else target
    chosen = attention_choice(q, keys, implementation, target)
    run = partial(_attend, scale=scale, generation=chosen.generation)
    return run(q, keys, values, start.astype(jnp.int32), stop.astype(jnp.int32))


def attend_seen(
    q: Floats[Array, "B H d"],
    keys: CodedCache,
    values: CodedCache,
    seen: Bool[Array, "B S"],
    *,
    scale: float,
    implementation: str = "auto",
    target: Target | None = None,
) -> Floats[Array, "B H d"]:
    """`attend` to any slots of a cache, those that are `seen`.

    A kernel runs where every sequence's slots lie side by side, which is known at run
    time only; XLA's form where one's do not.

    Raises:
      ValueError: unknown implementation, or no kernel for "pallas".
    """
    target = here() if target is None else target
    generation = attention_choice(q, keys, implementation, target).generation
    if generation is None:
        return by_xla(q, keys, values, seen, scale)
    start = jnp.argmax(seen, 1).astype(jnp.int32)
    count = jnp.sum(seen, 1, dtype=jnp.int32)
    last = seen.shape[1] - jnp.argmax(seen[:, ::-1], 1).astype(jnp.int32)
    stop = jnp.where(count == 0, start, last)

    def on_kernel() -> jax.Array:
        return _attend(q, keys, values, start, stop, scale=scale, generation=generation)

    whole = jnp.all(stop - start == count)
    return jax.lax.cond(whole, on_kernel, lambda: by_xla(q, keys, values, seen, scale))


def attention_choice(
    q: Any, keys: CodedCache, implementation: str, target: Target
) -> Choice:
    """Which implementation attends, and why no other does.

    Raises:
      ValueError: unknown implementation, or no kernel for "pallas".
    """
    check_implementation(implementation)
    if implementation == "xla":
        return Choice("xla", refused="XLA was asked for")
    why = _unfit(q, keys, target)
    if why and implementation == "pallas":
        raise ValueError(f'implementation is "pallas", but {why}')
    return Choice("xla", refused=why) if why else Choice("pallas", target.generation)


def _unfit(q: Any, keys: CodedCache, target: Target) -> str:
    why = unfit_target(target)
    if why:
        return why
    if q.dtype != jnp.bfloat16:
        return f"the kernel contracts bfloat16; the queries are {q.dtype.name}"
    cached, generation = jax.eval_shape(_cached, keys), str(target.generation)
    slots = pallas_tpu.choose(cached)
    return pallas_tpu.left_to_xla(generation, cached) or pallas_tpu.too_large(
        generation, q, cached, slots
    )


def _cached(cache: CodedCache) -> Cached:
    """As kernels take it: the scales of a slot's heads side by side."""
    B = cache.codes.shape[0]
    return Cached(cache.codes, jnp.swapaxes(cache.scale, 1, 2).reshape(B, 1, -1))


@partial(jax.jit, static_argnames=("scale", "generation"))
def _attend(
    q: Any,
    keys: CodedCache,
    values: CodedCache,
    start: Any,
    stop: Any,
    *,
    scale: float,
    generation: str | None,
) -> jax.Array:
    if generation is not None:
        return pallas_tpu.kv_attention(
            q, _cached(keys), _cached(values), start, stop,
            scale=scale, generation=generation,
        )  # fmt: skip
    return by_xla(q, keys, values, between(start, stop, keys), scale)


def between(start: Any, stop: Any, keys: CodedCache) -> Bool[Array, "B S"]:
    """The slots from `start[B]` to before `stop[B]`."""
    slots = jnp.arange(keys.codes.shape[1])
    return (slots >= start[:, None]) & (slots < stop[:, None])


def by_xla(
    q: Any, keys: CodedCache, values: CodedCache, seen: Any, scale: float
) -> jax.Array:
    """Scales on scores and weights: the codes go into the products as they are."""
    B, _, G, d = keys.codes.shape
    heads = q.reshape(B, G, -1, d)
    scores = jnp.einsum(
        "bgqd,bsgd->bgqs", heads, keys.codes.astype(q.dtype),
        preferred_element_type=jnp.float32,
    )  # fmt: skip
    scores = scores * (keys.scale * scale)[:, :, None]
    scores = jnp.where(seen[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1) * values.scale[:, :, None]
    # Weights times small scales would be too small for float16.
    dtype = jnp.float32 if q.dtype == jnp.float16 else q.dtype
    out = jnp.einsum(
        "bgqs,bsgd->bgqd", weights.astype(dtype), values.codes.astype(dtype),
        preferred_element_type=jnp.float32,
    )  # fmt: skip
    out = out.reshape(q.shape) * seen.any(1)[:, None, None]
    return out.astype(q.dtype)
