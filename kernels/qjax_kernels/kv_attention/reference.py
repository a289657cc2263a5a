"""The meaning of the operation: softmax attention over what the codes stand for."""

from typing import Any

import jax
import jax.numpy as jnp

from qjax_kernels.kv_attention.cached import Cached, check


def decode(cached: Cached) -> jax.Array:
    """Keys or values in float32, `[B, S, G, d]`."""
    B, S, G, _ = cached.codes.shape

    def spread(values: Any) -> Any:
        if cached.tokens is None:
            return values.reshape(B, S, G, 1)
        return jnp.repeat(values, cached.tokens, axis=1)

    wide = cached.codes.astype(jnp.float32)
    wide = wide if cached.zero is None else wide - spread(cached.zero)
    return wide * spread(cached.scale)


def kv_attention(
    q: Any,
    keys: Cached,
    values: Cached,
    start: Any,
    stop: Any,
    *,
    scale: float,
    dtype: Any = None,
) -> jax.Array:
    """Softmax attention of one new token of every sequence, in float32.

    `H / G` query heads, neighbours, share a head of keys and values.

    Args:
      q: float `[B, H, d]`.
      keys: of `[B, S, G, d]`.
      values: likewise, scales for each slot and head.
      start: int32 `[B]`, the first slot that a sequence sees.
      stop: int32 `[B]`, the slot after the last; with none at all the result is 0.
      scale: of the scores, `d ** -0.5` mostly.
      dtype: of the result; default that of `q`.

    Returns:
      `[B, H, d]`.

    Raises:
      ValueError: shapes or dtypes do not agree.
    """
    check(q, keys, values, start, stop)
    B, S, G, d = keys.codes.shape
    exact = jax.lax.Precision.HIGHEST
    heads = q.astype(jnp.float32).reshape(B, G, -1, d)
    scores = jnp.einsum("bgqd,bsgd->bgqs", heads, decode(keys), precision=exact) * scale
    slots = jnp.arange(S)
    seen = (slots >= start[:, None]) & (slots < stop[:, None])
    seen = seen[:, None, None]
    scores = jnp.where(seen, scores, -jnp.inf)
    top = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.where(seen, jnp.exp(scores - jnp.where(seen, top, 0)), 0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights / jnp.where(total == 0, 1, total)
    v = jnp.where(seen[:, 0, 0, :, None, None], decode(values), 0)
    out = jnp.einsum("bgqs,bsgd->bgqd", weights, v, precision=exact)
    return out.reshape(q.shape).astype(q.dtype if dtype is None else dtype)
