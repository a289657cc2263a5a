"""Histograms of activations in fixed shapes, and the percentiles read from them.

The range is `[-limit, limit]` with `limit` a power of two. A larger value doubles it
until it fits, pairs of bins becoming one, which is exact: the counts depend on the
values alone, not on their order, their batches or the order of merging.
"""

from dataclasses import dataclass
from math import ceil
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32

from qjax.core.granularity import Granularity, to_blocks
from qjax.core.minifloat import floor_log2, power_of_two
from qjax.core.pytrees import register
from qjax.core.statistics import (
    Interval,
    Range,
    check_rows,
    feature_range,
    known,
    per_block,
)

_LEAST_EXPONENT = -100


@dataclass(frozen=True)
class Counts:
    """How many values fell into each bin of each of `G` blocks.

    Attributes:
      counts: `[G, bins]` over `[-limit, limit]`; a bin holds its end nearer to zero,
        the outermost ones both ends.
      limit: `[G]`, powers of two; 0 where every value was zero.
      low: `[G]`, the smallest value, exactly; NaN or infinite if any value was.
      high: `[G]`, the largest.
    """

    counts: Any
    limit: Any
    low: Any
    high: Any

    @property
    def bins(self) -> int:
        """Bins on both sides of zero."""
        return self.counts.shape[-1]

    def width(self) -> Float32[Array, " G"]:
        """Width of a bin."""
        return self.limit * np.float32(2 / self.bins)

    def centers(self) -> Float32[Array, "G bins"]:
        """The middle of each bin."""
        place = np.arange(self.bins, dtype=np.float32) + np.float32(0.5 - self.bins / 2)
        return self.width()[:, None] * place

    def magnitudes(self) -> Float32[Array, "G half"]:
        """Counts of `|x|` in `bins / 2` bins over `[0, limit]`."""
        half = self.bins // 2
        return self.counts[:, half:] + self.counts[:, :half][:, ::-1]

    def absmax(self) -> Float32[Array, " G"]:
        """The largest magnitude, exactly."""
        return jnp.maximum(-self.low, self.high)


register(Counts, ("counts", "limit", "low", "high"))


@dataclass(frozen=True)
class Histogram:
    """Counts of the input's values, `Counts` of `ceil(K / rows)` blocks.

    Args:
      bins: on both sides of zero together; a power of two, 4 at least. A bin is at most
        `4 / bins` of the largest magnitude wide.
      rows: features that share a histogram; None all, 1 each its own.

    Raises:
      ValueError: a field has an illegal value.
    """

    bins: int = 2048
    rows: int | None = None

    def __post_init__(self):
        check_bins("Histogram", self.bins)
        check_rows("Histogram", self.rows)

    def init(self, K: int) -> Counts:
        """No tokens."""
        blocks = ceil(K / (self.rows or K))
        none = jnp.full(blocks, jnp.inf, jnp.float32)
        counts = jnp.zeros((blocks, self.bins), jnp.float32)
        return Counts(counts, jnp.zeros(blocks, jnp.float32), none, -none)

    def update(self, state: Counts, x: Any, weight: Any, full: Any = None) -> Counts:
        """With the tokens of a batch."""
        each = feature_range(x, weight)
        low = per_block(each.low, self.rows, jnp.min, np.inf)
        high = per_block(each.high, self.rows, jnp.max, -np.inf)
        x, use = self._blocks(x, weight)
        limit = cover(jnp.max(jnp.where(use, jnp.abs(x), np.float32(0)), axis=1))
        limit = jnp.maximum(limit, state.limit)
        new = Counts(_counts(x, use, limit, self.bins), limit, low, high)
        return self.merge(state, new)

    def _blocks(self, x: Any, weight: Any) -> tuple[Array, Array]:
        """The values of each block, `[G, rows * M]`, and which of them count."""
        granularity = Granularity(self.rows, None)
        x = x.T.astype(jnp.float32)
        use = jnp.isfinite(x) & (weight > 0)
        x = jnp.where(use, x, np.float32(0))
        x, use = to_blocks(x, granularity), to_blocks(use, granularity)
        return x.reshape(x.shape[0], -1), use.reshape(x.shape[0], -1)

    def merge(self, a: Counts, b: Counts) -> Counts:
        """With the tokens of both."""
        limit = jnp.maximum(a.limit, b.limit)
        counts = _widened(a, limit) + _widened(b, limit)
        ends = Range().merge(Interval(a.low, a.high), Interval(b.low, b.high))
        return Counts(counts, limit, ends.low, ends.high)

    def finalize(self, state: Counts) -> Counts:
        """The counts; `low` and `high` are zero without tokens."""
        ends = known(Interval(state.low, state.high))
        return Counts(state.counts, state.limit, ends.low, ends.high)


@dataclass(frozen=True)
class Quantile(Histogram):
    """The `100 - p` and `p` percentiles, an `Interval` of `[ceil(K / rows)]`.

    Read from a histogram, so within one bin of `numpy.percentile`.

    Args:
      bins: of the histogram.
      rows: features that share the percentiles; None all, 1 each its own.
      p: percent, in (50, 100].

    Raises:
      ValueError: a field has an illegal value.
    """

    p: float | int = 99.99

    def __post_init__(self):
        super().__post_init__()
        check_percent("Quantile", self.p)

    def finalize(self, state: Counts) -> Any:
        """Both percentiles; zero without tokens."""
        return percentiles(super().finalize(state), self.p)


def cover(absmax: Float32[Array, " G"]) -> Float32[Array, " G"]:
    """The smallest power of two that is not below `absmax`; 0 for 0."""
    exponent = jnp.clip(floor_log2(absmax), _LEAST_EXPONENT, 127)
    above = absmax > power_of_two(exponent)
    limit = power_of_two(jnp.minimum(exponent + above.astype(jnp.int32), 127))
    return jnp.where(absmax > 0, limit, np.float32(0))


def _counts(x: Array, use: Array, limit: Array, bins: int) -> Float32[Array, "G bins"]:
    half = bins // 2
    per_unit = jnp.where(
        limit > 0, np.float32(half) / jnp.where(limit > 0, limit, 1), 0
    )
    step = jnp.floor(jnp.abs(x) * per_unit[:, None]).astype(jnp.int32)
    step = jnp.minimum(step, half - 1)
    place = jnp.where(x < 0, half - 1 - step, half + step)
    block = jnp.arange(x.shape[0])[:, None]
    # Whole numbers: a float32 count that grows by one stops at 2^24.
    counts = jnp.zeros((x.shape[0], bins), jnp.int32)
    return counts.at[block, place].add(use.astype(jnp.int32)).astype(jnp.float32)


def _widened(state: Counts, limit: Array) -> Float32[Array, "G bins"]:
    """The counts in the wider bins of a larger `limit`."""
    half = state.bins // 2
    doublings = floor_log2(limit) - floor_log2(state.limit)
    doublings = jnp.where(state.limit > 0, jnp.minimum(doublings, 31), 0)
    side = np.arange(half)[::-1]
    step = np.concatenate([side, side[::-1]]).astype(np.int32)
    step = step >> doublings[:, None]
    negative = np.arange(state.bins) < half
    place = jnp.where(negative, half - 1 - step, half + step)
    block = jnp.arange(state.counts.shape[0])[:, None]
    return jnp.zeros_like(state.counts).at[block, place].add(state.counts)


def percentiles(counts: Counts, p: float | int) -> Interval:
    """The `100 - p` and `p` percentiles of each block, within one bin."""
    if p == 100:
        return Interval(counts.low, counts.high)
    high = _from_top(counts.counts, counts, p)
    low = -_from_top(counts.counts[:, ::-1], counts, p)
    within = [jnp.clip(end, counts.low, counts.high) for end in (low, high)]
    return _marked(Interval(*within), counts)


def magnitude_percentile(counts: Counts, p: float | int) -> Float32[Array, " G"]:
    """The `p` percentile of `|x|` in each block, within one bin."""
    if p == 100:
        return counts.absmax()
    top = jnp.minimum(_from_top(counts.magnitudes(), counts, p), counts.absmax())
    return _marked(Interval(-top, top), counts).high


def _marked(interval: Interval, counts: Counts) -> Interval:
    """NaN where a value was not finite."""
    fine = jnp.isfinite(counts.low) & jnp.isfinite(counts.high)
    ends = [jnp.where(fine, end, jnp.nan) for end in (interval.low, interval.high)]
    return Interval(*ends)


def _from_top(numbers: Array, counts: Counts, p: float | int) -> Float32[Array, " G"]:
    """The `p` percentile of bins that end at `limit`, counted from the top.

    From the top, because that is where float32 sums of few values are exact.
    """
    above = jnp.cumsum(numbers[:, ::-1], axis=1)
    last = jnp.maximum(above[:, -1] - 1, 0)
    rank = last * np.float32(1 - p / 100)
    ends = [_ranked(above, counts, r) for r in (jnp.floor(rank), jnp.ceil(rank))]
    return ends[0] + (ends[1] - ends[0]) * (rank - jnp.floor(rank))


def _ranked(above: Array, counts: Counts, rank: Array) -> Float32[Array, " G"]:
    """The value that `rank` values exceed, were each bin's values evenly spread."""
    place = jnp.argmax(above > rank[:, None], axis=1)
    upto = jnp.take_along_axis(above, place[:, None], 1)[:, 0]
    before = jnp.take_along_axis(above, jnp.maximum(place - 1, 0)[:, None], 1)[:, 0]
    before = jnp.where(place > 0, before, 0)
    inside = (rank - before + np.float32(0.5)) / jnp.maximum(upto - before, 1)
    whole = place.astype(jnp.float32)
    return counts.limit - counts.width() * (whole + jnp.clip(inside, 0, 1))


def check_bins(owner: str, bins: Any) -> None:
    """Refuse a number of bins that is no power of two.

    Raises:
      ValueError: naming the field and the value.
    """
    whole = isinstance(bins, int) and not isinstance(bins, bool)
    if not whole or bins < 4 or bins & (bins - 1):
        raise ValueError(f"{owner}.bins must be a power of two >= 4, got {bins!r}")


def check_percent(owner: str, p: Any) -> None:
    """Refuse a percentage that does not cover the middle.

    Raises:
      ValueError: naming the field and the value.
    """
    if not isinstance(p, (int, float)) or not 50 < p <= 100:
        raise ValueError(f"{owner}.p must be in (50, 100] percent, got {p!r}")
