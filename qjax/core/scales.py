"""From weights to the range, and so to the scale, of each block."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from qjax.core.granularity import Granularity, block_sizes, spread, to_blocks
from qjax.core.minifloat import unit_factors
from qjax.core.pytrees import register

# The end of float32, with room for one rounding of a scale to bfloat16.
TOP = np.float32(2.0**128 * (1 - 2.0**-7))
Range = tuple[Float32[Array, "... Gk Gn"], Float32[Array, "... Gk Gn"]]


@dataclass(frozen=True)
class MinMax:
    """The range is from the smallest to the largest weight, zero always included."""


@dataclass(frozen=True)
class AbsMax:
    """The range is from -max|w| to max|w|, also for asymmetric formats."""


@dataclass(frozen=True)
class Percentile:
    """The range leaves out the largest `100 - p` percent of the magnitudes.

    Asymmetric formats cut each end at its own percentile. Between two weights the
    percentile is interpolated linearly, as `numpy.percentile` does.

    Args:
      p: percent of the weights of a block that the range covers, above 50.
    """

    p: float | int = 99.9

    def __post_init__(self):
        if not 50 < self.p <= 100:
            raise ValueError(
                f"Percentile.p is {self.p}; it must be in (50, 100] percent"
            )


@dataclass(frozen=True)
class MSE:
    """Shrink each block's range by the factor that leaves the least error.

    The candidates are `1 - i/grid` for `i` in `0 .. maxshrink*grid - 1`, the error
    `sum |w - w_hat|^norm`, weighted by `importance` per input feature where given. The
    defaults are those of compressed-tensors' `memoryless_mse`.

    Args:
      norm: exponent of the error.
      grid: number of steps a factor from 1 to 0 would take.
      maxshrink: largest fraction by which the range may shrink.
    """

    norm: float | int = 2.4
    grid: int = 100
    maxshrink: float = 0.2

    def __post_init__(self):
        if not self.norm > 0:
            raise ValueError(f"MSE.norm is {self.norm}; it must be above 0")
        if self.grid < 1:
            raise ValueError(f"MSE.grid is {self.grid}; it must be at least 1")
        if not 0 < self.maxshrink < 1:
            raise ValueError(f"MSE.maxshrink is {self.maxshrink}; it must be in (0, 1)")

    def factors(self) -> np.ndarray:
        """The factors to try, the whole range first."""
        count = max(int(self.maxshrink * self.grid), 1)
        return (1 - np.arange(count) / self.grid).astype(np.float32)


Search = MinMax | AbsMax | Percentile | MSE
MINMAX = MinMax()


@dataclass(frozen=True, eq=False)
class Grid:
    """What turns codes into weights, one value for each block; None where absent.

    Attributes:
      scale: `[..., Gk, Gn]` in the dtype in which it is stored.
      zero: `[..., Gk, Gn]`; unsigned codes for integer zeros, else floats.
      codebook: `[..., levels]`, the learned levels in rising order.
      global_scale: `[..., 1, 1]` float32, NVFP4's second scale.
    """

    scale: Any
    zero: Any = None
    codebook: Any = None
    global_scale: Any = None


register(Grid, ("scale", "zero", "codebook", "global_scale"))


def block_range(
    w: Float[Array, "... K N"], granularity: Granularity, search: Search
) -> Range:
    """Smallest and largest weight that each block's grid must reach, float32.

    Zero is always inside. A block that holds a NaN or an infinity has a NaN range, so
    that it decodes to NaN and nothing hides it.
    """
    blocks = to_blocks(w.astype(jnp.float32), granularity)
    if isinstance(search, Percentile):
        low, high = _percentiles(w, granularity, search.p)
    else:
        low, high = blocks.min((-3, -1)), blocks.max((-3, -1))
    low, high = jnp.minimum(low, 0), jnp.maximum(high, 0)
    if isinstance(search, AbsMax):
        high = jnp.maximum(-low, high)
        low = -high
    finite = jnp.isfinite(blocks).all((-3, -1))
    return jnp.where(finite, low, jnp.nan), jnp.where(finite, high, jnp.nan)


def block_absmax(
    w: Float[Array, "... K N"], granularity: Granularity, search: Search
) -> Float32[Array, "... Gk Gn"]:
    """Largest magnitude that each block's symmetric grid must reach, float32."""
    if isinstance(search, Percentile):
        low, high = block_range(w, granularity, MINMAX)
        _, cut = _percentiles(jnp.abs(w), granularity, search.p)
        # NaN marks a block that is not finite; the percentile alone would hide it.
        return jnp.where(jnp.isnan(low + high), jnp.nan, cut)
    low, high = block_range(w, granularity, MINMAX)
    return jnp.maximum(-low, high)


def _percentiles(w: Array, granularity: Granularity, p: float) -> Range:
    K, N = w.shape[-2:]
    blocks = jnp.moveaxis(to_blocks(w.astype(jnp.float32), granularity, np.inf), -3, -2)
    ordered = jnp.sort(blocks.reshape(*blocks.shape[:-2], -1), axis=-1)
    last = block_sizes(granularity, K, N) - 1
    return _at(ordered, last * (1 - p / 100)), _at(ordered, last * (p / 100))


def _at(ordered: Array, position: np.ndarray) -> Array:
    """Values of `ordered[..., Gk, Gn, n]` at fractional positions `[Gk, Gn]`."""
    below = np.floor(position).astype(np.int32)
    above = np.ceil(position).astype(np.int32)

    def pick(index):
        shape = (*ordered.shape[:-1], 1)
        index = jnp.broadcast_to(jnp.asarray(index)[..., None], shape)
        return jnp.take_along_axis(ordered, index, -1)[..., 0]

    low, high = pick(below), pick(above)
    return low + (high - low) * (position - below).astype(np.float32)


def search_grid(
    w: Float[Array, "... K N"],
    granularity: Granularity,
    grid_of: Callable[[Any], Grid],
    decode: Callable[[Grid], Array],
    search: Search,
    importance: Float[Array, "... K"] | None = None,
) -> Grid:
    """The grid for the best factor of each block's range.

    Args:
      w: the weights.
      granularity: the blocks.
      grid_of: from factors `[..., Gk, Gn]` (or the number 1) to the grid of the range
        multiplied by them.
      decode: from a grid to the weights as coded on it.
      search: only `MSE` tries more than the whole range.
      importance: weight of the error for each input feature, `MSE` only.

    Raises:
      ValueError: `importance` came with a search that measures no error.
    """
    if not isinstance(search, MSE):
        if importance is not None:
            raise ValueError(
                f"importance needs a search that measures an error, MSE(); got {search}"
            )
        return grid_of(np.float32(1))
    factors = jnp.asarray(search.factors())
    exact = w.astype(jnp.float32)
    # In units of each block, so that no power of an error leaves float32.
    unit, _ = unit_factors(block_absmax(w, granularity, MINMAX))
    unit = spread(unit, granularity, *w.shape[-2:])

    def error(factor):
        errors = jnp.abs(exact - decode(grid_of(factor))) * unit
        errors = errors ** np.float32(search.norm)
        if importance is not None:
            errors *= importance[..., :, None].astype(jnp.float32)
        return to_blocks(errors, granularity).sum((-3, -1))

    def better(i, best):
        least, factor = best
        new = error(factors[i])
        smaller = new < least
        return jnp.where(smaller, new, least), jnp.where(smaller, factors[i], factor)

    least = error(factors[0])
    start = least, jnp.full_like(least, factors[0])
    _, factor = jax.lax.fori_loop(1, len(search.factors()), better, start)
    return grid_of(factor)


def positive(
    scale: Float[Array, "... Gk Gn"], absmax: Float32[Array, "... Gk Gn"]
) -> Float[Array, "... Gk Gn"]:
    """`scale` without zeros: `not_flushed`, and all-zero blocks take the epsilon."""
    scale = not_flushed(scale, absmax)
    return jnp.where(scale == 0, jnp.finfo(scale.dtype).eps, scale).astype(scale.dtype)


def not_flushed(
    scale: Float[Array, "... Gk Gn"], absmax: Float32[Array, "... Gk Gn"]
) -> Float[Array, "... Gk Gn"]:
    """`scale` raised to the smallest number that lasts, unless `absmax` is zero.

    Devices flush subnormal numbers of float32 and bfloat16 to zero; those of float16
    are normal in float32, where scales are used.
    """
    limits = jnp.finfo(scale.dtype)
    half = scale.dtype == jnp.float16
    least = np.asarray(limits.smallest_subnormal if half else limits.tiny, scale.dtype)
    lost = (jnp.abs(scale) < least) & (absmax > 0)
    return jnp.where(lost, jnp.copysign(least, scale), scale)


def finite_to(
    scale: Float[Array, "... Gk Gn"], levels: Any
) -> Float[Array, "... Gk Gn"]:
    """`scale` brought nearer to zero where `levels` of it would overflow float32."""
    if scale.dtype == jnp.float16:
        return scale  # too small to overflow float32
    limit = jnp.asarray(TOP / levels, jnp.float32).astype(scale.dtype)
    return jnp.clip(scale, -limit, limit)


def scale_type(scale_dtype: str | None, w: Array) -> Any:
    """The dtype scales are stored in: the named one, or that of the weights."""
    return w.dtype if scale_dtype is None else jnp.dtype(scale_dtype)


def check_scale_dtype(owner: str, scale_dtype: Any) -> str | None:
    """The name of a legal `scale_dtype`.

    Raises:
      ValueError: it is not None, float32, bfloat16 or float16.
    """
    legal = ("float32", "bfloat16", "float16")
    if scale_dtype is None or scale_dtype in legal:
        return scale_dtype
    raise ValueError(
        f"{owner}.scale_dtype is {scale_dtype!r}; "
        f"it must be None (the weights' own dtype) or one of {', '.join(legal)}"
    )
