"""One- and two-bit signs times the mean magnitude of a block."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, UInt8

from qjax.core.granularity import Granularity, block_sizes, channel, spread, to_blocks
from qjax.core.minifloat import unit_factors
from qjax.core.rounding import divide, rounder
from qjax.core.scales import (
    MINMAX,
    Grid,
    Search,
    check_scale_dtype,
    not_flushed,
    positive,
    scale_type,
)

_CHANNEL = channel()


@dataclass(frozen=True)
class Binary:
    """`+-scale`, one bit: code 1 is +, 0 is -; `scale = mean|w|` (XNOR-Net).

    A block of zeros has the scale 0.
    """

    granularity: Granularity = _CHANNEL
    scale_dtype: str | None = None

    def __post_init__(self):
        check_scale_dtype("Binary", self.scale_dtype)

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return 1

    @property
    def name(self) -> str:
        """A short name, such as `binary channel`."""
        return f"binary {self.granularity.label}"

    def fit(self, w: Any, search: Search = MINMAX, importance: Any = None) -> Grid:
        """Scales `[..., Gk, Gn]` of `w[..., K, N]`."""
        return _fit_mean(self, w, search, importance, not_flushed)

    def to_codes(
        self, w: Any, grid: Grid, rounding: str = "nearest", key: Any = None
    ) -> UInt8[Array, "... K N"]:
        """1 where `w[..., K, N]` is at least 0 (at random if stochastic), else 0."""
        if rounding == "nearest":
            return (w >= 0).astype(jnp.uint8)
        units = _over(w, grid, self.granularity)
        up = rounder(rounding, key)(jnp.clip((units + 1) / 2, 0, 1))
        return jnp.clip(up, 0, 1).astype(jnp.uint8)

    def from_codes(self, codes: Array, grid: Grid) -> Float32[Array, "... K N"]:
        """The weights that codes stand for, float32."""
        K, N = codes.shape[-2:]
        signs = codes.astype(jnp.float32) * 2 - 1
        return signs * spread(grid.scale.astype(jnp.float32), self.granularity, K, N)


@dataclass(frozen=True)
class Ternary:
    """`{-1, 0, 1} * scale` in two bits; `scale = mean|w|` (BitNet b1.58).

    Codes are `q + 2`, those of `Int(2)`, so that one decoder serves both.
    """

    granularity: Granularity = _CHANNEL
    scale_dtype: str | None = None

    def __post_init__(self):
        check_scale_dtype("Ternary", self.scale_dtype)

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return 2

    @property
    def name(self) -> str:
        """A short name, such as `ternary channel`."""
        return f"ternary {self.granularity.label}"

    def fit(self, w: Any, search: Search = MINMAX, importance: Any = None) -> Grid:
        """Scales `[..., Gk, Gn]` of `w[..., K, N]`."""
        return _fit_mean(self, w, search, importance, positive)

    def to_codes(
        self, w: Any, grid: Grid, rounding: str = "nearest", key: Any = None
    ) -> UInt8[Array, "... K N"]:
        """`q + 2` for `q = clip(round(w / scale), -1, 1)` of `w[..., K, N]`."""
        q = rounder(rounding, key)(_over(w, grid, self.granularity))
        q = jnp.where(jnp.isnan(q), 0, jnp.clip(q, -1, 1))
        return (q + 2).astype(jnp.uint8)

    def from_codes(self, codes: Array, grid: Grid) -> Float32[Array, "... K N"]:
        """The weights that codes stand for, float32."""
        K, N = codes.shape[-2:]
        q = codes.astype(jnp.float32) - 2
        return q * spread(grid.scale.astype(jnp.float32), self.granularity, K, N)


def _over(w: Any, grid: Grid, granularity: Granularity) -> Array:
    K, N = w.shape[-2:]
    scale = spread(grid.scale.astype(jnp.float32), granularity, K, N)
    scale = jnp.where(scale == 0, 1, scale)
    return divide(w.astype(jnp.float32), jnp.broadcast_to(scale, w.shape))


def _fit_mean(number: Any, w: Any, search: Search, importance: Any, keep: Any) -> Grid:
    if search != MINMAX or importance is not None:
        raise ValueError(
            f"search is {search} and importance is {type(importance).__name__}; "
            f"{type(number).__name__} has no range to search, its scale is the mean "
            "magnitude: leave them at MinMax() and None"
        )
    K, N = w.shape[-2:]
    blocks = to_blocks(jnp.abs(w.astype(jnp.float32)), number.granularity)
    sizes = block_sizes(number.granularity, K, N).astype(np.float32)
    absmax = blocks.max((-3, -1))
    unit, back = unit_factors(absmax)
    total = (blocks * unit[..., :, None, :, None]).sum((-3, -1))
    mean = jnp.where(jnp.isfinite(absmax), divide(total, sizes) * back, jnp.nan)
    return Grid(keep(mean.astype(scale_type(number.scale_dtype, w)), absmax))
