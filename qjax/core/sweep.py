"""GPTQ from a Hessian: the order of the features, the grids, the sweep.

Everything that GPTQ and the methods built on it share; a method adds its target.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32
from jaxtyping import Int as Integer

from qjax.core.compensate import Coder, compensate
from qjax.core.formats import NVFP4, Additive, Codebook, Format
from qjax.core.hessian import Factor, dead_features, drift_target, factorize
from qjax.core.pytrees import register
from qjax.core.scales import MINMAX, Grid, Search

ORDERS = ("off", "static", "dynamic", "group")


def whole_grid(format: Format) -> bool:
    """Whether levels, vectors or a second scale are those of the whole matrix."""
    learned = isinstance(format, Codebook) and format.levels is None
    return learned or isinstance(format, (NVFP4, Additive))


def second_scale(format: Format) -> bool:
    """Whether the scales of a matrix have a scale of their own, as NVFP4's have."""
    return isinstance(format, NVFP4)


def side_by_side(format: Format) -> bool:
    """Whether matrices with one input can be solved as one.

    No column of the weights then has a say in the codes of another, but through a
    second scale, which the matrices share. That loses nothing: it only moves the first
    scales into the range of their type.
    """
    double = isinstance(format, Codebook) and format.double_quant is not None
    alone = second_scale(format) or not whole_grid(format)
    return format.granularity.cols == 1 and alone and not double


def settled(format: Format, dtype: Any) -> Format:
    """The format whose scales have the dtype that weights of `dtype` give them."""
    if getattr(format, "scale_dtype", "") is None:
        return replace(format, scale_dtype=jnp.dtype(dtype).name)
    return format


@dataclass(frozen=True)
class Sweep:
    """How a matrix is swept.

    Args:
      format: how the weights are stored.
      search: how the range of each block is chosen.
      damping: the first rung of `factorize`.
      block_size: rows whose error is passed on together. No code depends on it.
      act_order: which feature is rounded first. "off": the first. The others start with
        the largest `H[j, j]`. "static": grids are fitted to the original weights in
        their own groups. "dynamic": groups are formed in the new order, which leaves a
        permutation of the input. "group": whole groups by their largest feature, and
        the features inside each.
      importance: whether `search` weighs errors by `H[j, j]`.
    """

    format: Format
    search: Search = MINMAX
    damping: float = 0.01
    block_size: int = 128
    act_order: str = "static"
    importance: bool = False

    @property
    def grouped(self) -> bool:
        """Whether features of one column differ in scale."""
        return self.format.granularity.rows is not None

    @property
    def ahead(self) -> bool:
        """Whether grids are fitted before the sweep, to the original weights.

        Otherwise each group's grid is fitted to its weights as they are when the sweep
        reaches its first feature, as in the paper.
        """
        return whole_grid(self.format) or not self.grouped or self.act_order == "static"

    @property
    def permuted(self) -> bool:
        """Whether groups are formed in the order of the sweep."""
        return self.act_order == "dynamic" and self.grouped


@dataclass(frozen=True)
class Swept:
    """What a sweep found.

    Attributes:
      codes: `[K, N]`, features in their own order, or in `permutation`'s.
      grid: of the codes.
      permutation: `[K]`, the feature behind each row of the codes; None if its own.
      notes: `damping`, `diagonal`, `dead` of the report.
    """

    codes: Any
    grid: Any
    permutation: Any
    notes: Any


register(Swept, ("codes", "grid", "permutation", "notes"))


def sweep(
    w: Float[Array, "K N"],
    h: Float32[Array, "K K"],
    how: Sweep,
    cross: Float32[Array, "K K"] | None = None,
    alpha: float = 1.0,
) -> Swept:
    """Codes of `w` whose error `tr((w - q)^T h (w - q))` is small.

    Weights of features that no sample used become zero, unless no sample used any.

    Args:
      w: the weights; scales without a dtype of their own take theirs.
      h: `E[x x^T]`.
      how: formats and order.
      cross: `E[(full - x) x^T]`; the codes then also make up for that drift.
      alpha: how much of the drift is made up for.
    """
    dead = dead_features(h)
    dtype, w = w.dtype, w.astype(jnp.float32)
    kept = jnp.where((dead & ~dead.all())[:, None], np.float32(0), w)
    order = feature_order(jnp.diagonal(h), how)
    factor = factorize(h, how.damping, order)
    notes = {
        "damping": factor.fraction,
        "diagonal": factor.diagonal,
        "dead": dead.sum(),
    }
    target = _take(kept, order)
    if cross is not None:
        cross = cross * np.float32(alpha)
        drift, notes["drift"] = _drift(_take(w, order), cross, order, factor)
        target += drift
    importance = jnp.diagonal(h) if how.importance else None
    coder = _coder(kept, importance, order, how, dtype)
    codes, fitted = compensate(target, factor.upper, coder, _block_rows(how))
    grid = coder.grid if fitted is None else _own_groups(fitted, order, how)
    if how.permuted:
        return Swept(codes, grid, order, notes)
    return Swept(_untake(codes, order), grid, None, notes)


def feature_order(
    diagonal: Float32[Array, " K"], how: Sweep
) -> Integer[Array, " K"] | None:
    """The features in the order in which they are rounded; None is their own."""
    if how.act_order == "off":
        return None
    K, rows = diagonal.shape[0], how.format.granularity.rows
    if how.act_order != "group" or rows is None:
        return jnp.argsort(-diagonal)
    group = np.arange(K) // rows
    largest = jnp.full((group[-1] + 1,), -jnp.inf).at[group].max(diagonal)
    if K % rows:  # the partial group stays the last one
        largest = largest.at[-1].set(-jnp.inf)
    return jnp.lexsort((-diagonal, jnp.asarray(group), -largest[group]))


def _take(x: Any, order: Any) -> Any:
    return x if order is None else x[order]


def _untake(x: Any, order: Any) -> Any:
    return x if order is None else x[jnp.argsort(order)]


def _drift(w: Any, cross: Any, order: Any, factor: Factor) -> tuple[Array, Array]:
    """What the target moves by, and whether the statistics allow it."""
    usable = jnp.isfinite(cross).all() & ~factor.diagonal
    ordered = _take(_take(cross, order).T, order).T * factor.unit
    drift = drift_target(factor.upper, ordered, w)
    return jnp.where(usable, drift, np.float32(0)), usable


def _coder(kept: Any, importance: Any, order: Any, how: Sweep, dtype: Any) -> Coder:
    K, format = kept.shape[0], settled(how.format, dtype)
    ordered = None if importance is None else _take(importance, order)
    if not how.ahead:
        return Coder(format, how.search, None, None, ordered)
    feature = jnp.arange(K) if order is None or how.permuted else order
    if how.permuted:
        kept, importance = _take(kept, order), ordered
    grid = format.fit(kept, how.search, importance)
    group = feature // (format.granularity.rows or K)
    return Coder(format, how.search, grid, group, None)


def _block_rows(how: Sweep) -> int:
    """Rows of one block: a grid that is fitted on the way needs its group at once."""
    return how.block_size if how.ahead else how.format.granularity.rows or 1


def _own_groups(grid: Grid, order: Any, how: Sweep) -> Grid:
    """Grids in the order in which the sweep reached the groups, put back in theirs."""
    if order is None or how.permuted:
        return grid
    rows = how.format.granularity.rows
    reached = jnp.argsort(order[::rows] // rows)
    zero = None if grid.zero is None else grid.zero[reached]
    return replace(grid, scale=grid.scale[reached], zero=zero)
