"""Calibrators: from statistics of a site's input to a static activation range.

An activation is coded as `x.T[K, M]`. A static range is one for the whole input
(`tensor()`), for each feature (`block(1, None)`) or for each group of features
(`block(g, None)`); the grid's scale and zero point are `[ceil(K / g), 1]`, float32
unless the format says otherwise. Of NVFP4 only the `global_scale[1, 1]` is static, the
scales of its blocks stay dynamic.
"""

from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float32, Int32

from qjax.core import formats
from qjax.core.formats import NVFP4, Format, Granularity, Int
from qjax.core.histogram import (
    Counts,
    Histogram,
    check_bins,
    check_percent,
    magnitude_percentile,
    percentiles,
)
from qjax.core.qtensor import Activation
from qjax.core.scales import Grid
from qjax.core.statistics import Interval, MovingRange, Range, Statistic, per_block

_EACH = Granularity(1, None)


@runtime_checkable
class Calibrator(Protocol):
    """What turns a site's inputs into the static range of its activation format."""

    def statistic(self, format: Format) -> Statistic:
        """What to accumulate over the site's input.

        Raises:
          ValueError: the format has no static range, or not one of this kind.
        """
        ...

    def grid(self, format: Format, finalized: Any) -> Grid:
        """The static grid, from the finalized statistic.

        NaN where an input that counted held NaN or infinity.
        """
        ...


def check_static(owner: str, format: Format) -> None:
    """Refuse a format of which nothing can be calibrated.

    Raises:
      ValueError: naming the format and what would be valid.
    """
    if isinstance(format, NVFP4):
        return
    if not isinstance(format, (Int, formats.Float)):
        raise ValueError(
            f"{owner} cannot calibrate {format.name}: only Int, Float and NVFP4 have "
            "a static range"
        )
    if format.granularity.cols is not None:
        raise ValueError(
            f"{owner} cannot calibrate {format.name}: its scales belong to single "
            "tokens; take tensor(), block(1, None) for each feature or block(g, None) "
            "for each group of features"
        )


def static_rows(format: Format) -> int | None:
    """Features that share a static range; None is all of them."""
    return None if isinstance(format, NVFP4) else format.granularity.rows


def range_grid(
    format: Format, low: Float32[Array, " G"], high: Float32[Array, " G"]
) -> Grid:
    """The grid on which each block reaches from `low` to `high`, zero included."""
    ends = jnp.stack([low, high], axis=1)
    if isinstance(format, NVFP4):
        return Grid(None, global_scale=format.fit(ends).global_scale)
    assert isinstance(format, (Int, formats.Float))
    # The ends are a matrix of one row per block: the format's own rule applies.
    return replace(format, granularity=_EACH).fit(ends)


@dataclass(frozen=True)
class MinMaxRange:
    """From the smallest to the largest value seen: no value is clipped."""

    def statistic(self, format: Format) -> Range:
        """The range of each feature."""
        check_static("MinMaxRange", format)
        return Range()

    def grid(self, format: Format, finalized: Interval) -> Grid:
        """The format's grid on the range of each block."""
        rows = static_rows(format)
        low = per_block(finalized.low, rows, jnp.min, np.inf)
        return range_grid(
            format, low, per_block(finalized.high, rows, jnp.max, -np.inf)
        )


@dataclass(frozen=True)
class MovingAverageRange:
    """The moving average of each batch's range, as PyTorch's observer of that name.

    Args:
      rate: how far a batch moves the range, in (0, 1]; 0.01, as in PyTorch.

    Raises:
      ValueError: `rate` out of range.
    """

    rate: float | int = 0.01

    def __post_init__(self):
        if not 0 < self.rate <= 1:
            raise ValueError(
                f"MovingAverageRange.rate must be in (0, 1], got {self.rate!r}"
            )

    def statistic(self, format: Format) -> MovingRange:
        """The moving range of each block."""
        check_static("MovingAverageRange", format)
        return MovingRange(self.rate, static_rows(format))

    def grid(self, format: Format, finalized: Interval) -> Grid:
        """The format's grid on the averaged range."""
        return range_grid(format, finalized.low, finalized.high)


@dataclass(frozen=True)
class PercentileRange:
    """The range that leaves out the largest `100 - p` percent of the magnitudes.

    Asymmetric formats cut each end at its own percentile. Percentiles are read from a
    histogram and lie within one bin of `numpy.percentile`.

    Args:
      p: percent covered, in (50, 100]; 99.99, as in pytorch-quantization.
      bins: of `|x|`, a power of two; 2048, as in pytorch-quantization.

    Raises:
      ValueError: a field has an illegal value.
    """

    p: float | int = 99.99
    bins: int = 2048

    def __post_init__(self):
        check_percent("PercentileRange", self.p)
        check_bins("PercentileRange", self.bins)

    def statistic(self, format: Format) -> Histogram:
        """The histogram of each block."""
        check_static("PercentileRange", format)
        return Histogram(2 * self.bins, static_rows(format))

    def grid(self, format: Format, finalized: Counts) -> Grid:
        """The format's grid between the percentiles."""
        if isinstance(format, Int) and not format.symmetric:
            ends = percentiles(finalized, self.p)
            return range_grid(format, ends.low, ends.high)
        top = magnitude_percentile(finalized, self.p)
        return range_grid(format, -top, top)


@dataclass(frozen=True)
class _Searched:
    """A search over the bins of a histogram of `|x|`."""

    bins: int = 2048
    start: int = 128
    stride: int = 1

    def __post_init__(self):
        owner = type(self).__name__
        check_bins(owner, self.bins)
        for field in ("start", "stride"):
            value = getattr(self, field)
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not whole or not 1 <= value <= self.bins:
                raise ValueError(
                    f"{owner}.{field} must be a whole number from 1 to {self.bins} "
                    f"(bins), got {value!r}"
                )


@dataclass(frozen=True)
class MSERange(_Searched):
    """The range of least squared error over the histogram.

    The search of pytorch-quantization (`_compute_amax_mse`): every bin's center from
    `start` on is tried as the largest magnitude, the error is that of the bins' centers
    on the format's own grid. Asymmetric formats clip both ends at the magnitude tried.
    The whole range is among the candidates.

    Args:
      bins: of `|x|`, a power of two; 2048, as in the reference.
      start: the first bin tried; 128, as in the reference.
      stride: bins from one candidate to the next; 1, as in the reference. With one
        range per feature a larger one saves time.

    Raises:
      ValueError: a field has an illegal value.
    """

    def statistic(self, format: Format) -> Histogram:
        """The histogram of each block."""
        check_static("MSERange", format)
        if isinstance(format, NVFP4):
            raise ValueError(
                "MSERange cannot calibrate nvfp4: its global scale clips nothing; take "
                "MinMaxRange() or PercentileRange()"
            )
        return Histogram(2 * self.bins, static_rows(format))

    def grid(self, format: Format, finalized: Counts) -> Grid:
        """The format's grid on the best range."""
        scaled, unit = _in_units(finalized)
        tried = np.append(np.arange(self.start, self.bins, self.stride), self.bins)
        tops = ((tried + 0.5) / self.bins).astype(np.float32)

        def error(top):
            return squared_error(format, scaled, top)

        best = jnp.argmin(lax.map(error, jnp.asarray(tops)), axis=0)
        return _clipped(format, finalized, jnp.asarray(tops)[best] * unit)


def squared_error(format: Format, counts: Counts, top: Any) -> Float32[Array, " G"]:
    """Squared error of each block's values when clipped at magnitude `top`."""
    assert isinstance(format, (Int, formats.Float))
    each = replace(format, granularity=_EACH)
    grid, centers = _clipped(format, counts, top), counts.centers()
    decoded = each.from_codes(each.to_codes(centers, grid), grid)
    return jnp.sum(jnp.square(decoded - centers) * counts.counts, axis=1)


def _in_units(counts: Counts) -> tuple[Counts, Float32[Array, " G"]]:
    """The histogram over [-1, 1], and its unit: no square leaves float32 then."""
    unit = jnp.where(counts.limit > 0, counts.limit, np.float32(1))
    ends = [end / unit for end in (counts.low, counts.high)]
    return Counts(counts.counts, counts.limit / unit, *ends), unit


def _clipped(format: Format, counts: Counts, top: Any) -> Grid:
    """The grid of each block's range, clipped at magnitude `top`."""
    fine = jnp.isfinite(counts.low) & jnp.isfinite(counts.high)
    low = jnp.where(fine, jnp.maximum(counts.low, -top), jnp.nan)
    return range_grid(
        format, low, jnp.where(fine, jnp.minimum(counts.high, top), jnp.nan)
    )


@dataclass(frozen=True)
class KLRange(_Searched):
    """Entropy calibration: the clipping that keeps most of the distribution.

    The search of TensorRT as pytorch-quantization has it (`_compute_amax_entropy`):
    for every number of bins `i` from `start` on, the Kullback-Leibler divergence of the
    histogram of `|x|` cut at `i`, its tail added to the last bin, to the same merged
    into `2^(bits-1)` levels and spread again over the bins that are not empty. As
    there, the bin at zero counts as much as the next one, and of equal divergences the
    widest range wins. Asymmetric formats clip both ends at the magnitude found.

    The bins are those of `Histogram`, up to the one with the largest value: they divide
    a power of two where the reference's divide the first batch's maximum. The reference
    serves integers only; the levels of a `Float` are here the sets of bins whose
    centers it rounds alike.

    Args:
      bins: of `|x|`, a power of two; 2048, as in the reference.
      start: the first number of bins tried; 128, as in the reference.
      stride: step between the numbers tried; 1, as in the reference.

    Raises:
      ValueError: a field has an illegal value.
    """

    def statistic(self, format: Format) -> Histogram:
        """The histogram of each block."""
        check_static("KLRange", format)
        if isinstance(format, NVFP4):
            raise ValueError(
                "KLRange cannot calibrate nvfp4: its global scale clips nothing; take "
                "MinMaxRange() or PercentileRange()"
            )
        return Histogram(2 * self.bins, static_rows(format))

    def grid(self, format: Format, finalized: Counts) -> Grid:
        """The format's grid on the range of least divergence."""
        magnitudes = finalized.magnitudes()
        kept = jax.vmap(lambda m: self.kept_bins(m, format))(magnitudes)
        return _clipped(format, finalized, kept * finalized.width())

    def kept_bins(
        self, magnitudes: Float32[Array, " bins"], format: Format
    ) -> Float32[Array, ""]:
        """How many bins of `|x|` the best range keeps."""
        number = jnp.arange(1, self.bins + 1)
        last = jnp.max(jnp.where(magnitudes > 0, number, 0))
        magnitudes = magnitudes.at[0].set(magnitudes[1])
        tried = jnp.arange(self.start, self.bins + 1, self.stride)

        def one(count):
            level = levels_of(format, magnitudes.shape[0], count)
            loss = divergence(magnitudes, count, level)
            return jnp.where(count <= last, loss, jnp.inf)

        losses = lax.map(one, tried)
        best = tried.size - 1 - jnp.argmin(losses[::-1])
        return tried[best].astype(jnp.float32)


def levels_of(format: Format, bins: int, count: Any) -> Int32[Array, " bins"]:
    """The level of each bin of `|x|` when the format reaches to the end of bin `count`.

    Of an `Int` as many as there are magnitudes, equally wide; of a `Float` one for each
    value that it rounds centers of bins to.
    """
    index = jnp.arange(bins)
    if isinstance(format, Int):
        levels = jnp.minimum(np.int32(format.half), count)
        return jnp.minimum(index * levels // count, np.int32(bins - 1))
    assert isinstance(format, formats.Float)
    each = replace(format, granularity=_EACH)
    top = jnp.asarray(count, jnp.float32)[None]
    grid = range_grid(format, -top, top)
    centers = (index.astype(jnp.float32) + np.float32(0.5))[None]
    values = each.from_codes(each.to_codes(centers, grid), grid)[0]
    return jnp.cumsum(jnp.diff(values, prepend=values[:1]) > 0, dtype=jnp.int32)


def divergence(
    magnitudes: Float32[Array, " bins"], count: Any, level: Int32[Array, " bins"]
) -> Float32[Array, ""]:
    """`KL(histogram cut at count bins || the same merged into levels)`, in nats."""
    bins = magnitudes.shape[0]
    index = jnp.arange(bins)
    kept = jnp.where(index < count, magnitudes, 0)
    tail = jnp.sum(magnitudes) - jnp.sum(kept)
    sums = jnp.zeros(bins, jnp.float32).at[level].add(kept)
    sizes = jnp.zeros(bins, jnp.float32).at[level].add((kept > 0).astype(jnp.float32))
    mean = (sums / jnp.maximum(sizes, 1))[level]
    model = jnp.where(kept > 0, mean, 0)
    data = kept + jnp.where(index == count - 1, tail, 0)
    ratio = jnp.where(data > 0, data / jnp.where(data > 0, model, 1), 1)
    loss = jnp.sum(data * jnp.log(ratio)) / jnp.sum(data)
    loss = loss - jnp.log(jnp.sum(data) / jnp.sum(model))
    return jnp.where(jnp.isnan(loss), jnp.inf, loss)


MINMAX_RANGE = MinMaxRange()


def check_calibrator(
    owner: str, calibrator: Any, activation: Activation | None
) -> None:
    """Refuse what is no calibrator, or does not serve a static activation format.

    Raises:
      TypeError: it is not a calibrator.
      ValueError: it does not serve the format.
    """
    if isinstance(calibrator, type) or not isinstance(calibrator, Calibrator):
        raise TypeError(
            f"{owner}.calibrator must be a calibrator such as MinMaxRange(), "
            f"got {calibrator!r}"
        )
    if activation is not None and not activation.dynamic:
        calibrator.statistic(activation.format)


def calibrator_of(method: Any) -> Calibrator | None:
    """What finds a method's static activation range; None where nothing is static.

    A method that names no calibrator takes `MinMaxRange()`.
    """
    if method.activation is None or method.activation.dynamic:
        return None
    return getattr(method, "calibrator", None) or MINMAX_RANGE
