"""The meaning of the operation: `x @ S`, `S` a sparse matrix of outlier weights."""

from typing import Any

import jax
import jax.numpy as jnp

from qjax_kernels.element_outlier.elements import TILE, Elements


def dense(elements: Elements) -> jax.Array:
    """`S[K, N]` in float32."""
    words = elements.words
    right, down, _ = words.shape
    values = jax.lax.bitcast_convert_type(words & jnp.uint32(0xFFFF0000), jnp.float32)
    tile_row = jnp.arange(down)[:, None] * TILE
    tile_col = jnp.arange(right)[:, None, None] * TILE
    rows = ((words >> 7) & 127).astype(jnp.int32) + tile_row
    cols = (words & 127).astype(jnp.int32) + tile_col
    S = jnp.zeros((down * TILE, right * TILE), jnp.float32).at[rows, cols].add(values)
    return S[: elements.shape[0], : elements.shape[1]]


def element_outlier(x: Any, elements: Elements, *, dtype: Any = None) -> jax.Array:
    """`x[M, K] @ S[K, N]`, in float32 and rounded once.

    Args:
      x: float `[M, K]`.
      elements: SpQR's outliers (Dettmers et al., 2023), sorted into tiles.
      dtype: of the result; default that of `x`.

    Returns:
      `[M, N]`.

    Raises:
      ValueError: `x` has another number of columns.
    """
    check(x, elements)
    y = jnp.matmul(x.astype(jnp.float32), dense(elements), precision="highest")
    return y.astype(x.dtype if dtype is None else dtype)


def check(x: Any, elements: Elements) -> None:
    """That shapes agree.

    Raises:
      ValueError: they do not.
    """
    if x.ndim != 2 or x.shape[1] != elements.shape[0]:
        raise ValueError(f"x has shape {x.shape}; it must be (M, {elements.shape[0]})")
