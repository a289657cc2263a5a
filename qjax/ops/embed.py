"""Lookup of rows of a quantized embedding."""

from dataclasses import replace
from functools import reduce
from operator import add
from typing import Any

import jax
import jax.numpy as jnp

from qjax.core.coded import Coded
from qjax.core.formats import Granularity
from qjax.core.qtensor import QTensor, factor
from qjax.core.scales import Grid
from qjax.ops.packed import unpacked


def embed(
    ids: Any,
    q: QTensor,
    *,
    dtype: Any = None,
    fill: float | None = None,
) -> jax.Array:
    """Rows `ids` of an embedding, decoded after the lookup.

    The embedding is coded along its features: its matrix is `w[K, N]` with `K` features
    and `N` tokens, and only the columns asked for are unpacked.

    Args:
      ids: whole numbers of any shape; out of range they are clipped, or
      fill: what a row out of range becomes, if not None.
      q: coded parts and low rank only, no leading axes.
      dtype: of the result; default the leaf's.

    Returns:
      `[*ids, K]`.
    """
    dtype = jnp.dtype(q.dtype if dtype is None else dtype)
    return _qembed(ids, q, dtype, fill)


def _embed(ids: Any, q: QTensor, dtype: Any, fill: float | None) -> Any:
    inside = (ids >= 0) & (ids < q.layout.N)
    flat = jnp.clip(ids, 0, q.layout.N - 1).reshape(-1)
    terms = [columns(part, flat) for part in q.parts]
    if q.left is not None:
        right = factor(q.right, jnp.float32)[:, flat]
        terms.append(factor(q.left, jnp.float32) @ right)
    rows = reduce(add, terms).T.astype(dtype)
    rows = rows.reshape(*ids.shape, q.layout.K)
    if fill is None:
        return rows
    return jnp.where(inside[..., None], rows, jnp.asarray(fill, dtype))


_embed.__name__ = "qembed"
_qembed = jax.jit(_embed, static_argnums=(2, 3))


def columns(part: Coded, ids: Any) -> jax.Array:
    """Columns `ids` of a coded `w[K, N]`, decoded to float32 `[K, len(ids)]`."""
    grid, granularity = part.grid(), part.format.granularity
    cols = granularity.cols

    def pick(values: Any) -> Any:
        if values is None or values.ndim < 2 or values.shape[-1] == 1:
            return values
        return values[..., ids if cols == 1 else ids // cols]

    chosen = Grid(pick(grid.scale), pick(grid.zero), grid.codebook, grid.global_scale)
    part = unpacked(part)
    few = replace(part, codes=part.codes[:, ids], shape=(part.shape[0], ids.size))
    codes = few.unpack()
    format = part.format
    if cols not in (1, None):
        narrow = Granularity(granularity.rows, 1)
        format = replace(format, granularity=narrow)  # pyright: ignore
    return format.from_codes(codes, chosen)
