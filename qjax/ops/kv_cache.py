"""Keys and values of a cache, in a float dtype or in codes with a scale each.

A coded cache holds `codes[L, B, S, G, d]` and one float32 scale for every token and
head, `scale[L, B, G, S]`: `value = codes * scale`, `scale = max |value|` over
the largest code. New tokens never change the codes of old ones.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Float as Floats

from qjax.core.formats import Float, Int
from qjax.core.pytrees import register

LARGEST = {"int8": 127, "int4": 7, "float8_e4m3fn": 448}


@dataclass(frozen=True)
class CodedCache:
    """Codes `[L, B, S, G, d]` and scales `[L, B, G, S]` of keys or of values."""

    codes: Any
    scale: Any

    def layer(self, index: Any) -> "CodedCache":
        """One layer's codes `[B, S, G, d]` and scales `[B, G, S]`."""
        return jax.tree.map(lambda x: _taken(x, index), self)


register(CodedCache, ("codes", "scale"), ())


def empty(shape: tuple[int, int, int, int, int], dtype: Any) -> Any:
    """Room for keys or values `[L, B, S, G, d]`.

    Args:
      shape: layers, sequences, slots, heads, features.
      dtype: int8, int4, or a format `Int(8)`, `Int(4)`, `Float("e4m3")`: codes with
        scales; a float dtype, float8 among them: values without.

    Raises:
      ValueError: another integer dtype, or another format.
    """
    coded = _coded_dtype(dtype)
    if coded is not None:
        layers, batch, slots, heads, _ = shape
        scale = jnp.zeros((layers, batch, heads, slots), jnp.float32)
        return CodedCache(jnp.zeros(shape, coded), scale)
    return jnp.zeros(shape, dtype)


def _coded_dtype(dtype: Any) -> Any:
    """The dtype of the codes; None for a cache of floats."""
    if isinstance(dtype, (Int, Float)):
        codes = {Int(8).name: jnp.int8, Int(4).name: jnp.int4}
        codes[Float("e4m3").name] = jnp.float8_e4m3fn
        if dtype.name not in codes:
            raise ValueError(
                f"a cache of {dtype.name} is not there; use {', '.join(codes)}"
            )
        return codes[dtype.name]
    dtype = jnp.dtype(dtype)
    if dtype in (jnp.int8, jnp.int4):
        return dtype
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"a cache of {dtype} is not there; use int8, int4 or a float dtype"
        )
    return None


def write(cache: Any, layer: Any, slot: Any, new: Floats[Array, "B T G d"]) -> Any:
    """The cache with `new` in the slots `slot`, `slot + 1`, ... of a layer.

    Values beyond the range of a float cache are clipped to it.
    """
    zero = jnp.zeros((), jnp.int32)
    at = (layer, zero, slot, zero, zero)
    if isinstance(cache, CodedCache):
        codes, scale = encode(new, cache.codes.dtype)
        scale = jnp.swapaxes(scale, 1, 2)[None]
        return CodedCache(
            jax.lax.dynamic_update_slice(cache.codes, codes[None], at),
            jax.lax.dynamic_update_slice(cache.scale, scale, (layer, zero, zero, slot)),
        )
    limit = jnp.finfo(cache.dtype)
    if limit.bits < jnp.finfo(new.dtype).bits:
        top = jnp.asarray(limit.max, new.dtype)
        new = jnp.clip(new, -top, top)
    return jax.lax.dynamic_update_slice(cache, new[None].astype(cache.dtype), at)


def read(cache: Any, layer: Any, dtype: Any) -> Floats[Array, "B S G d"]:
    """Keys or values of a layer as floats."""
    if isinstance(cache, CodedCache):
        one = cache.layer(layer)
        scale = jnp.swapaxes(one.scale, 1, 2)[..., None]
        return (one.codes.astype(jnp.float32) * scale).astype(dtype)
    return _taken(cache, layer).astype(dtype)


def _taken(x: Any, layer: Any) -> Any:
    return jax.lax.dynamic_index_in_dim(x, layer, keepdims=False)


def encode(
    x: Floats[Array, "B T G d"], dtype: Any
) -> tuple[Array, Floats[Array, "B T G"]]:
    """Codes and scales of every token and head; zeros stay zeros."""
    largest = LARGEST[jnp.dtype(dtype).name]
    wide = x.astype(jnp.float32)
    # A normal number, so that no finite value becomes a NaN.
    scale = jnp.max(jnp.abs(wide), axis=-1) / largest
    scale = jnp.where(scale < jnp.finfo(jnp.float32).tiny, 0, scale)
    codes = wide / jnp.where(scale == 0, 1, scale)[..., None]
    codes = jnp.clip(codes, -largest, largest)
    whole = jnp.issubdtype(dtype, jnp.integer)
    return (jnp.round(codes) if whole else codes).astype(dtype), scale
