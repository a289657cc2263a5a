"""Outlier weights on a TPU, which has no gather: both of its places are products.

An entry of a tile picks a column of `x` and adds to a column of the result. As rows of
a matrix of ones and zeros on one side, and of values on the other, entries do both on
the matrix unit: `(x @ P) @ V`, exactly, for `x` and values are bfloat16.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qjax_kernels.compat import chip
from qjax_kernels.element_outlier.elements import TILE, Elements
from qjax_kernels.element_outlier.reference import check

DOWN = 8  # tiles along K in a step: the sublanes of a register of words
TOKENS = 256
MIB = 2**20
LEAST_LIMIT = 16 * MIB
MOST_SLOTS = 2048
"""Entries of the fullest tile: more are more code than a compiler takes in seconds."""


def element_outlier(
    x: Any,
    elements: Elements,
    *,
    generation: str,
    dtype: Any = None,
    interpret: Any = False,
) -> jax.Array:
    """`x[M, K] @ S[K, N]`, see `reference.element_outlier`; `x` in bfloat16.

    Args:
      x: float `[M, K]`, contracted in bfloat16.
      elements: the sparse matrix in tiles.
      generation: of the TPU: "v5e", "v5p", "v6e" or "v7x".
      dtype: of the result; default that of `x`.
      interpret: as for `pl.pallas_call`.

    Returns:
      `[M, N]`.

    Raises:
      ValueError: `x` has another number of columns, the generation is unknown, or a
        tile holds too many entries.
    """
    check(x, elements)
    chip(generation)
    problem = too_large(elements)
    if problem:
        raise ValueError(problem)
    M, (K, N) = x.shape[0], elements.shape
    dtype = jnp.dtype(x.dtype if dtype is None else dtype)
    words = elements.words
    right, down, slots = words.shape
    step = DOWN if down > DOWN else down
    short = -down % step
    words = jnp.pad(words, ((0, 0), (0, short), (0, 0))) if short else words
    wide = (down + short) * TILE
    x = x.astype(jnp.bfloat16)
    x = jnp.pad(x, ((0, 0), (0, wide - K))) if wide > K else x
    m, steps = min(TOKENS, M), (down + short) // step
    return pl.pallas_call(
        partial(_kernel, tiles=step, steps=steps),
        grid=(pl.cdiv(M, m), right, steps),
        in_specs=[
            pl.BlockSpec((m, step * TILE), lambda i, j, k: (i, k)),
            pl.BlockSpec((None, step, slots), lambda i, j, k: (j, k, 0)),
        ],
        out_specs=pl.BlockSpec((m, TILE), lambda i, j, k: (i, j)),
        out_shape=jax.ShapeDtypeStruct((M, N), dtype),
        scratch_shapes=[pltpu.VMEM((m, TILE), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=LEAST_LIMIT,
        ),
        interpret=interpret,
        name=name_of(elements),
    )(x, words)


def too_large(elements: Elements) -> str:
    """That a tile holds more entries than a step has room for; empty if none does."""
    slots = elements.words.shape[2]
    if slots <= MOST_SLOTS:
        return ""
    return (
        f"a tile of {TILE} x {TILE} weights holds up to {slots} outliers; the kernel "
        f"takes {MOST_SLOTS}"
    )


def name_of(elements: Elements) -> str:
    """A name for profiles: `elements_256`, with the slots of a tile."""
    return f"elements_{elements.words.shape[2]}"


def _kernel(x: Any, words: Any, out: Any, total: Any, *, tiles: int, steps: int):
    """Some tiles along K, for one block of outputs."""
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _start():
        total[...] = jnp.zeros_like(total)

    for tile in range(tiles):
        columns = slice(tile * TILE, (tile + 1) * TILE)
        total[...] += tile_product(x[:, columns], words[tile : tile + 1, :])

    @pl.when(step == steps - 1)
    def _finish():
        out[...] = total[...].astype(out.dtype)


def tile_product(x: Any, words: Any) -> Any:
    """`x[m, 128]` times one tile, float32 `[m, 128]`; `words[1, slots]`."""
    place = lax.broadcasted_iota(jnp.int32, (TILE, words.shape[1]), 0)
    values = lax.bitcast_convert_type(words & jnp.uint32(0xFFFF0000), jnp.float32)
    row = ((words >> 7) & jnp.uint32(127)).astype(jnp.int32)
    column = (words & jnp.uint32(127)).astype(jnp.int32)
    picks = jnp.where(place == row, 1.0, 0.0).astype(jnp.bfloat16)
    puts = jnp.where(place == column, values, 0.0).astype(jnp.bfloat16)
    picked = _dot(x, picks, 0).astype(jnp.bfloat16)
    return _dot(picked, puts, 1)


def _dot(x: Any, y: Any, axis: int) -> Any:
    return lax.dot_general(
        x, y, (((1,), (axis,)), ((), ())), preferred_element_type=jnp.float32
    )
