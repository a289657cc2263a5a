"""Keys and values of a cache, in a float dtype or in int8 with a scale each.

An int8 cache holds `codes[L, B, S, G, d]` and one float32 scale for every token and
head, `scale[L, B, G, S]`: `value = codes * scale`, `scale = max |value| / 127`. New
tokens never change the codes of old ones.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qjax.core.pytrees import register

LARGEST = 127


@dataclass(frozen=True)
class Int8Cache:
    """Codes `[L, B, S, G, d]` and scales `[L, B, G, S]` of keys or of values."""

    codes: Any
    scale: Any


register(Int8Cache, ("codes", "scale"), ())


def empty(shape: tuple[int, int, int, int, int], dtype: Any) -> Any:
    """Room for keys or values `[L, B, S, G, d]`; int8 is coded, other dtypes are not.

    Raises:
      ValueError: an integer dtype other than int8.
    """
    dtype = jnp.dtype(dtype)
    if dtype == jnp.int8:
        layers, batch, slots, heads, _ = shape
        scale = jnp.zeros((layers, batch, heads, slots), jnp.float32)
        return Int8Cache(jnp.zeros(shape, jnp.int8), scale)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"a cache of {dtype} is not there; use int8 or a float dtype")
    return jnp.zeros(shape, dtype)


def write(cache: Any, layer: Any, slot: Any, new: Float[Array, "B T G d"]) -> Any:
    """The cache with `new` in the slots `slot`, `slot + 1`, ... of a layer.

    Values beyond the range of a float cache are clipped to it.
    """
    zero = jnp.zeros((), jnp.int32)
    at = (layer, zero, slot, zero, zero)
    if isinstance(cache, Int8Cache):
        codes, scale = encode(new)
        scale = jnp.swapaxes(scale, 1, 2)[None]
        return Int8Cache(
            jax.lax.dynamic_update_slice(cache.codes, codes[None], at),
            jax.lax.dynamic_update_slice(cache.scale, scale, (layer, zero, zero, slot)),
        )
    limit = jnp.finfo(cache.dtype)
    if limit.bits < jnp.finfo(new.dtype).bits:
        top = jnp.asarray(limit.max, new.dtype)
        new = jnp.clip(new, -top, top)
    return jax.lax.dynamic_update_slice(cache, new[None].astype(cache.dtype), at)


def read(cache: Any, layer: Any, dtype: Any) -> Float[Array, "B S G d"]:
    """Keys or values of a layer as floats."""

    def taken(x: Any) -> Any:
        return jax.lax.dynamic_index_in_dim(x, layer, keepdims=False)

    if isinstance(cache, Int8Cache):
        scale = jnp.swapaxes(taken(cache.scale), 1, 2)[..., None]
        return (taken(cache.codes).astype(jnp.float32) * scale).astype(dtype)
    return taken(cache).astype(dtype)


def encode(x: Float[Array, "B T G d"]) -> tuple[Array, Float[Array, "B T G"]]:
    """Codes and scales of every token and head; zeros stay zeros."""
    wide = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(wide), axis=-1) / LARGEST
    codes = jnp.round(wide / jnp.where(scale == 0, 1, scale)[..., None])
    return codes.astype(jnp.int8), scale
