"""Rounding row by row, each row making up for the error of those before it.

GPTQ rounds feature `j` of `w[K, N]` after all before it have moved it:

    w_j <- w_j - sum_{i<j} U[i, j] e_i,   e_i = (w_i - q_i) / U[i, i],   H^-1 = U^T U.

With `R = U^-1` (`H = R R^T`) and the error `D = W - Q` of the weights as they were at
first, the errors are `E = R^T D`, and the same `w_j` is

    w_j <- W_j + (1 / R[j, j]) sum_{i<j} R[i, j] D_i,

which is what is computed here: no inverse is needed (it is Babai's nearest plane). A
row reads the rows before it in its tile, a tile those of its block, and a block all
blocks before it in large matrix products.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32, Shaped

from qjax.core.formats import Format
from qjax.core.scales import Grid, Search

TILE = 8
CHUNK = 1024


@dataclass(frozen=True)
class Coder:
    """What codes the rows of a sweep.

    Attributes:
      format: with the dtype of its scales settled.
      search: for grids fitted on the way.
      grid: fitted ahead; None if each group's is fitted when the sweep reaches it.
      group: `[K]`, the row of `grid` for each row of the sweep.
      importance: `[K]`, of each row of the sweep, for grids fitted on the way, or None.
    """

    format: Format
    search: Search
    grid: Grid | None = None
    group: Any = None
    importance: Any = None

    def reach(self, start: Any, now: Float32[Array, "rows N"]) -> Grid:
        """The grid of the rows from `start` on, which are `now`: `[rows or 1, Gn]`."""
        rows = now.shape[0]
        if self.grid is not None:
            return _rows_of(self.grid, _slice(self.group, start, rows))
        weight = self.importance
        weight = None if weight is None else _slice(weight, start, rows)
        return self.format.fit(now, self.search, weight)

    def code(self, row: Float32[Array, " N"], grid: Grid, index: Any) -> tuple:
        """Codes and values of one row, on row `index` of what `reach` gave."""
        grid = grid if self.grid is None else _rows_of(grid, index[None])
        codes = self.format.to_codes(row[None], grid)
        return codes[0], self.format.from_codes(codes, grid)[0]


def _rows_of(grid: Grid, index: Any) -> Grid:
    zero = None if grid.zero is None else grid.zero[index]
    return replace(grid, scale=grid.scale[index], zero=zero)


def compensate(
    w: Float32[Array, "K N"], upper: Float32[Array, "K K"], coder: Coder, rows: int
) -> tuple[Shaped[Array, "K N"], Grid | None]:
    """Codes of `w`, and the grids `[Gk, Gn]` if they were fitted on the way.

    Args:
      w: what the rows should come to, in the order of the sweep.
      upper: `R`, in that order.
      coder: what codes them.
      rows: of a block; of a group, where grids are fitted on the way.
    """
    K, N = w.shape
    rows = min(rows, K)
    count, rest = divmod(K, rows)

    def block(residual, start, rows):
        carried = _carried(upper, residual, start, rows)
        square = lax.dynamic_slice(upper, (start, start), (rows, rows))
        wanted = now = _slice(w, start, rows)
        if coder.grid is None:
            now = wanted + _moved(square, carried)
        grid = coder.reach(start, now)
        residual, codes = _tiles(wanted, carried, square, grid, coder)
        return residual, (codes, grid if coder.grid is None else None)

    def step(residual, index):
        new, found = block(residual, index * rows, rows)
        return lax.dynamic_update_slice(residual, new, (index * rows, 0)), found

    start = jnp.zeros((count * rows, N), jnp.float32)
    residual, found = lax.scan(step, start, jnp.arange(count))
    found = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), found)
    if rest:
        _, last = block(residual, jnp.int32(count * rows), rest)
        found = jax.tree.map(lambda a, b: jnp.concatenate((a, b)), found, last)
    return found


def _carried(upper: Any, residual: Any, start: Any, rows: int) -> Array:
    """`sum_i R[i, j] D_i` over all rows `i` before `start`, `[rows, N]`."""
    done, N = residual.shape
    chunk = _divisor(done, CHUNK)

    def add(index, total):
        # Rows not yet reached have no residual, so that a chunk may go beyond `start`.
        strip = lax.dynamic_slice(upper, (index * chunk, start), (chunk, rows))
        return total + _product(strip.T, _slice(residual, index * chunk, chunk))

    chunks = (start + chunk - 1) // chunk
    return lax.fori_loop(0, chunks, add, jnp.zeros((rows, N), jnp.float32))


def _moved(square: Any, carried: Any) -> Array:
    """By how much the rows before a block have moved all of its rows."""
    return lax.linalg.triangular_solve(
        square, carried, left_side=True, lower=False, transpose_a=True
    )


def _tiles(wanted: Any, carried: Any, square: Any, grid: Grid, coder: Coder) -> tuple:
    """Residual and codes of a block, tile by tile."""
    rows, N = wanted.shape
    size = _divisor(rows, TILE)

    def step(residual, index):
        start = index * size
        strip = lax.dynamic_slice(square, (0, start), (rows, size))
        new, codes = _tile(
            start,
            _slice(wanted, start, size),
            _slice(carried, start, size) + _product(strip.T, residual),
            _slice(strip, start, size),
            grid,
            coder,
        )
        return lax.dynamic_update_slice(residual, new, (start, 0)), codes

    start = jnp.zeros((rows, N), jnp.float32)
    residual, codes = lax.scan(step, start, jnp.arange(rows // size))
    return residual, codes.reshape(rows, N)


def _tile(
    start: Any, wanted: Any, carried: Any, square: Any, grid: Grid, coder: Coder
) -> tuple:
    """Residual and codes of a tile, row by row."""

    def step(residual, index):
        moved = carried[index] + square[:, index] @ residual
        row = wanted[index] + moved / square[index, index]
        codes, value = coder.code(row, grid, start + index)
        return residual.at[index].set(wanted[index] - value), codes

    return lax.scan(step, jnp.zeros_like(wanted), jnp.arange(wanted.shape[0]))


def _slice(x: Any, start: Any, size: int) -> Array:
    return lax.dynamic_slice_in_dim(x, start, size)


def _product(a: Any, b: Any) -> Array:
    return jnp.matmul(a, b, precision="highest")


def _divisor(number: int, most: int) -> int:
    """The largest divisor of `number` up to `most`."""
    return max(d for d in range(1, most + 1) if number % d == 0)
