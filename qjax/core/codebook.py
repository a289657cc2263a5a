"""Codes that are indices into a table of levels."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, UInt8

from qjax.core.granularity import (
    Granularity,
    group,
    spread,
)
from qjax.core.levels import FP4, NF4, learn_levels, look_up, nearest_level
from qjax.core.rounding import divide, rounder, times_reciprocal
from qjax.core.scales import (
    MINMAX,
    Grid,
    Search,
    block_absmax,
    block_range,
    check_scale_dtype,
    finite_to,
    not_flushed,
    scale_type,
    search_grid,
)

TABLES = {"nf4": NF4, "fp4": FP4}
_GROUP_64 = group(64)


@dataclass(frozen=True)
class Codebook:
    """Levels times a scale: `w = levels[code] * scale`.

    The scale is the smallest at which the levels' ends reach the block's: `absmax` for
    NF4 and FP4. A block of zeros keeps the scale 0, as bitsandbytes stores it.

    Args:
      levels: "nf4", "fp4" (bitsandbytes' published tables, in the order of its codes),
        a tuple of 2 to 256 numbers, or None: `2^bits` levels learned for each matrix by
        Lloyd's algorithm on the scaled weights, kept beside the codes.
      granularity: which weights share a scale; QLoRA's default is groups of 64.
      double_quant: None, or how many scales (QLoRA: 256) share a second scale.
      scale_dtype: dtype of the scales; None is that of the weights.
      bits: bits of one code; by default what the number of levels needs.

    Raises:
      ValueError: a field has an illegal value.
    """

    levels: str | tuple[float | int, ...] | None = "nf4"
    granularity: Granularity = _GROUP_64
    double_quant: int | None = None
    scale_dtype: str | None = None
    bits: int | None = None

    def __post_init__(self):
        self._check_levels()
        check_scale_dtype("Codebook", self.scale_dtype)
        if self.double_quant is not None and not _is_positive(self.double_quant):
            raise ValueError(
                f"Codebook.double_quant is {self.double_quant!r}; it must be None or a "
                "positive whole number of scales per block, such as 256"
            )
        if self.levels is not None:
            needed = max((len(self.table) - 1).bit_length(), 1)
            if self.bits not in (None, needed):
                raise ValueError(
                    f"Codebook.bits is {self.bits}; {len(self.table)} levels take "
                    f"{needed} bits"
                )
            object.__setattr__(self, "bits", needed)

    def _check_levels(self):
        if self.levels is None:
            if not _is_positive(self.bits) or self.bits not in range(1, 9):
                raise ValueError(
                    f"Codebook.bits is {self.bits!r}; learned levels need 1 to 8 bits"
                )
            return
        if isinstance(self.levels, str):
            if self.levels not in TABLES:
                raise ValueError(
                    f"Codebook.levels is {self.levels!r}; it must be one of "
                    f"{tuple(TABLES)}, a tuple of numbers, or None"
                )
            return
        object.__setattr__(self, "levels", tuple(float(x) for x in self.levels))
        table = np.asarray(self.levels, np.float32)
        if not 2 <= table.size <= 256 or not np.isfinite(table).all():
            raise ValueError(
                f"Codebook.levels has {table.size} levels; "
                "it must have 2 to 256, all finite"
            )
        if not table.any():
            raise ValueError("Codebook.levels are all zero; one must differ from zero")

    @property
    def table(self) -> np.ndarray:
        """The fixed levels by code, float32."""
        named = TABLES[self.levels] if isinstance(self.levels, str) else self.levels
        return np.asarray(named, np.float32)

    @property
    def name(self) -> str:
        """A short name, such as `nf4 g64 dq`."""
        named = isinstance(self.levels, str)
        base = self.levels if named else f"codebook{self.bits}"
        learned = " learned" if self.levels is None else ""
        double = " dq" if self.double_quant else ""
        return f"{base} {self.granularity.label}{learned}{double}"

    def fit(
        self,
        w: Float[Array, "... K N"],
        search: Search = MINMAX,
        importance: Float[Array, "... K"] | None = None,
    ) -> Grid:
        """Scales `[..., Gk, Gn]`, and levels `[..., 2^bits]` where they are learned."""
        reach, absmax = self._reach(w, search)
        dtype = scale_type(self.scale_dtype, w)
        levels = None
        if self.levels is None:
            units = self._units(w, not_flushed(reach.astype(dtype), absmax))
            levels = learn_levels(units, self.bits or 1)

        def grid_of(factor):
            scale = not_flushed((reach * factor).astype(dtype), absmax)
            return Grid(scale, codebook=levels)

        return search_grid(
            w,
            self.granularity,
            grid_of,
            lambda grid: self.from_codes(self.to_codes(w, grid), grid),
            search,
            importance,
        )

    def _reach(self, w: Array, search: Search) -> tuple[Array, Array]:
        """The scale at which the levels' ends reach each block's range, and absmax."""
        low_level, high_level = -1.0, 1.0
        if self.levels is not None:
            low_level, high_level = float(self.table.min()), float(self.table.max())
        absmax = block_absmax(w, self.granularity, search)
        largest = max(high_level, -low_level, 1.0)
        if low_level == -high_level:
            if high_level == 1:
                return absmax, absmax
            return finite_to(divide(absmax, high_level), largest), absmax
        low, high = block_range(w, self.granularity, search)
        above = divide(high, high_level) if high_level > 0 else jnp.zeros_like(high)
        below = divide(low, low_level) if low_level < 0 else jnp.zeros_like(low)
        return finite_to(jnp.maximum(above, below), largest), absmax

    def _units(self, w: Array, scale: Array) -> Array:
        """`w` over its scale, by the reciprocal as bitsandbytes does."""
        K, N = w.shape[-2:]
        scale = scale.astype(jnp.float32)
        scale = spread(jnp.where(scale == 0, 1, scale), self.granularity, K, N)
        return times_reciprocal(w.astype(jnp.float32), scale)

    def to_codes(
        self,
        w: Float[Array, "... K N"],
        grid: Grid,
        rounding: str = "nearest",
        key: Any = None,
    ) -> UInt8[Array, "... K N"]:
        """Index of the nearest level; a value between two goes to the lower one."""
        units = self._units(w, grid.scale)
        if self.levels is None:
            return _choose(units, grid.codebook, rounding, key).astype(jnp.uint8)
        order = np.argsort(self.table, kind="stable")
        rank = _choose(units, jnp.asarray(self.table[order]), rounding, key)
        if (order == np.arange(len(order))).all():
            return rank.astype(jnp.uint8)
        return jnp.asarray(order.astype(np.uint8))[rank]

    def from_codes(self, codes: Array, grid: Grid) -> Float32[Array, "... K N"]:
        """The weights `levels[code] * scale` that codes stand for, float32."""
        K, N = codes.shape[-2:]
        if self.levels is None:
            values = look_up(grid.codebook, codes)
        else:
            values = jnp.asarray(self.table)[codes.astype(jnp.int32)]
        scale = spread(grid.scale.astype(jnp.float32), self.granularity, K, N)
        return values * scale


def _is_positive(count: Any) -> bool:
    return isinstance(count, int) and not isinstance(count, bool) and count > 0


def _choose(units: Array, levels: Array, rounding: str, key: Any) -> Array:
    """Ranks of levels (rising, `[..., L]`) for `units[..., K, N]`."""
    if rounding == "nearest":
        return nearest_level(units, (levels[..., :-1] + levels[..., 1:]) / 2)
    to_whole = rounder(rounding, key)
    last = levels.shape[-1] - 1
    below = jnp.clip(nearest_level(units, levels) - 1, 0, last - 1)
    low, high = look_up(levels, below), look_up(levels, below + 1)
    width = jnp.where(high > low, high - low, 1)
    share = jnp.clip((units - low) / width, 0, 1)
    return jnp.clip(below + to_whole(share).astype(jnp.int32), 0, last)
