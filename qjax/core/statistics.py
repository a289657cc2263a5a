"""Statistics of activations, accumulated batch by batch: sums that merge.

Every statistic is a frozen dataclass with `init`, `update`, `merge` and `finalize` on
pytrees of float32 arrays, so that calibration over several devices or processes is a
sum. One site's input is `x[M, K]`; experts and layers are mapped over by the caller.
Tokens of weight 0 never enter, whatever they hold. A NaN or an infinity that counts
makes the finalized statistic NaN or infinite, so that whoever reads it can name the
site.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from qjax.core.pytrees import register


@runtime_checkable
class Statistic(Protocol):
    """What is known of a site's input after some batches."""

    def init(self, K: int) -> Any:
        """The state before the first batch, for inputs of `K` features."""
        ...

    def update(
        self,
        state: Any,
        x: Float[Array, "M K"],
        weight: Float[Array, " M"],
        full: Float[Array, "M K"] | None = None,
    ) -> Any:
        """The state after a batch.

        `weight` is 0 for tokens that do not count (padding, other experts), else 1;
        `full` is the same input in the full-precision model, where that stream runs.
        """
        ...

    def merge(self, a: Any, b: Any) -> Any:
        """The state after the batches of both."""
        ...

    def finalize(self, state: Any) -> Any:
        """What solvers read."""
        ...


@dataclass(frozen=True)
class Sum:
    """A weighted sum over tokens, and how many there were."""

    total: Any
    count: Any


register(Sum, ("total", "count"))


def counted(
    x: Float[Array, "M K"], weight: Any, fill: float = 0
) -> Float32[Array, "M K"]:
    """`x` in float32, with `fill` in place of tokens of weight 0.

    A product with the weight would not do: padding may hold NaN.
    """
    return jnp.where(weight[:, None] > 0, x.astype(jnp.float32), np.float32(fill))


def per_block(
    values: Float32[Array, " K"], rows: int | None, reduce: Callable, fill: float
) -> Float32[Array, " G"]:
    """Reduce each run of `rows` features to one value; None is all of them."""
    K = values.shape[0]
    rows = rows or K
    short = ceil(K / rows) * rows - K
    padded = jnp.pad(values, (0, short), constant_values=np.float32(fill))
    return reduce(padded.reshape(-1, rows), axis=1)


class _Mean:
    """The mean over tokens of some product of the input."""

    def _term(self, x: Any, weight: Any, full: Any) -> Any:
        raise TypeError(f"{type(self).__name__} has no term")

    def _shape(self, K: int) -> tuple[int, ...]:
        return (K,)

    def init(self, K: int) -> Sum:
        """No tokens."""
        return Sum(jnp.zeros(self._shape(K), jnp.float32), jnp.zeros((), jnp.float32))

    def update(self, state: Sum, x: Any, weight: Any, full: Any = None) -> Sum:
        """With the tokens of a batch."""
        x = counted(x, weight)
        full = None if full is None else counted(full, weight)
        weight = weight.astype(jnp.float32)
        term = self._term(x, weight, full)
        return Sum(state.total + term, state.count + weight.sum())

    def merge(self, a: Sum, b: Sum) -> Sum:
        """With the tokens of both."""
        return Sum(a.total + b.total, a.count + b.count)

    def finalize(self, state: Sum) -> Float32[Array, "..."]:
        """The mean; zero without tokens."""
        return state.total / jnp.maximum(state.count, 1)


@dataclass(frozen=True)
class Mean(_Mean):
    """`E[x]`, `[K]`: for bias correction."""

    def _term(self, x: Any, weight: Any, full: Any) -> Any:
        return weight @ x


@dataclass(frozen=True)
class SecondMoment(_Mean):
    """`E[x^2]`, `[K]`: the importance of each input feature (imatrix)."""

    def _term(self, x: Any, weight: Any, full: Any) -> Any:
        return weight @ jnp.square(x)


@dataclass(frozen=True)
class MeanAbs(_Mean):
    """`E|x|`, `[K]`: AWQ's size of each input feature."""

    def _term(self, x: Any, weight: Any, full: Any) -> Any:
        return weight @ jnp.abs(x)


@dataclass(frozen=True)
class Hessian(_Mean):
    """`E[x x^T]`, `[K, K]`: half the Hessian of the layer's squared output error."""

    def _shape(self, K: int) -> tuple[int, ...]:
        return (K, K)

    def _term(self, x: Any, weight: Any, full: Any) -> Any:
        weighted = x * weight[:, None]
        return jnp.matmul(weighted.T, x, precision="highest")


@dataclass(frozen=True)
class Cross(_Mean):
    """`E[(full - x) x^T]`, `[K, K]`: how far the input has drifted (GPTAQ, QEP)."""

    def _shape(self, K: int) -> tuple[int, ...]:
        return (K, K)

    def _term(self, x: Any, weight: Any, full: Any) -> Any:
        if full is None:
            raise ValueError("Cross needs the full-precision input of the site")
        drift = (full - x) * weight[:, None]
        return jnp.matmul(drift.T, x, precision="highest")


@dataclass(frozen=True)
class AbsMaximum:
    """`max|x|`, `[K]`: SmoothQuant's range of each input feature."""

    def init(self, K: int) -> Float32[Array, " K"]:
        """No tokens."""
        return jnp.zeros(K, jnp.float32)

    def update(self, state: Any, x: Any, weight: Any, full: Any = None) -> Any:
        """With the tokens of a batch."""
        return jnp.maximum(state, jnp.max(jnp.abs(counted(x, weight)), axis=0))

    def merge(self, a: Any, b: Any) -> Any:
        """With the tokens of both."""
        return jnp.maximum(a, b)

    def finalize(self, state: Any) -> Float32[Array, " K"]:
        """The largest magnitudes; zero without tokens."""
        return state


@dataclass(frozen=True)
class Interval:
    """From the smallest to the largest value of each feature or block."""

    low: Any
    high: Any


register(Interval, ("low", "high"))


@dataclass(frozen=True)
class Range:
    """The smallest and the largest value of each feature, an `Interval` of `[K]`."""

    def init(self, K: int) -> Interval:
        """No tokens: an interval that is empty."""
        return Interval(jnp.full(K, jnp.inf), jnp.full(K, -jnp.inf))

    def update(self, state: Interval, x: Any, weight: Any, full: Any = None) -> Any:
        """With the tokens of a batch."""
        return self.merge(state, feature_range(x, weight))

    def merge(self, a: Interval, b: Interval) -> Interval:
        """With the tokens of both."""
        return Interval(jnp.minimum(a.low, b.low), jnp.maximum(a.high, b.high))

    def finalize(self, state: Interval) -> Interval:
        """The range; zero without tokens."""
        return known(state)


def feature_range(x: Float[Array, "M K"], weight: Any) -> Interval:
    """Smallest and largest counted value of each feature; infinities if none is."""
    low = jnp.min(counted(x, weight, np.inf), axis=0)
    return Interval(low, jnp.max(counted(x, weight, -np.inf), axis=0))


def known(interval: Interval) -> Interval:
    """The interval, zero where nothing was seen; NaN stays."""
    empty = interval.low > interval.high
    return jax.tree.map(lambda end: jnp.where(empty, np.float32(0), end), interval)


@dataclass(frozen=True)
class Moving:
    """Zero-started moving averages of the ends, the first ends, and how many."""

    average: Interval
    first: Interval
    count: Any


register(Moving, ("average", "first", "count"))


@dataclass(frozen=True)
class MovingRange:
    """Exponential moving average of each batch's smallest and largest value.

    The first batch sets the range, later ones move it: `m <- m + rate (new - m)`, as
    `MovingAverageMinMaxObserver` of PyTorch does. Batches without tokens do not count.

    Args:
      rate: how far a batch moves the range, in (0, 1]; 0.01, as in PyTorch.
      rows: features that share a range; None all, 1 each its own.

    Raises:
      ValueError: a field out of range.
    """

    rate: float | int = 0.01
    rows: int | None = None

    def __post_init__(self):
        if not 0 < self.rate <= 1:
            raise ValueError(f"MovingRange.rate must be in (0, 1], got {self.rate!r}")
        check_rows("MovingRange", self.rows)

    def init(self, K: int) -> Moving:
        """No batches."""
        ends = jnp.zeros(ceil(K / (self.rows or K)), jnp.float32)
        zero = Interval(ends, ends)
        return Moving(zero, zero, jnp.zeros((), jnp.float32))

    def update(self, state: Moving, x: Any, weight: Any, full: Any = None) -> Moving:
        """With one more batch."""
        each = feature_range(x, weight)
        low = per_block(each.low, self.rows, jnp.min, np.inf)
        batch = Interval(low, per_block(each.high, self.rows, jnp.max, -np.inf))
        rate = np.float32(self.rate)
        average = jax.tree.map(lambda end: rate * end, batch)
        new = self.merge(state, Moving(average, batch, jnp.ones((), jnp.float32)))
        seen = jnp.any(weight > 0)
        return jax.tree.map(lambda n, o: jnp.where(seen, n, o), new, state)

    def merge(self, a: Moving, b: Moving) -> Moving:
        """As if the batches of `b` had followed those of `a`: the order matters."""
        faded = np.float32(1 - self.rate) ** b.count
        average = jax.tree.map(lambda x, y: faded * x + y, a.average, b.average)
        began = a.count > 0
        first = jax.tree.map(lambda x, y: jnp.where(began, x, y), a.first, b.first)
        return Moving(average, first, a.count + b.count)

    def finalize(self, state: Moving) -> Interval:
        """The average, `[ceil(K / rows)]`; zero without batches."""
        faded = np.float32(1 - self.rate) ** state.count
        return jax.tree.map(lambda x, f: x + faded * f, state.average, state.first)


def check_rows(owner: str, rows: Any) -> None:
    """Refuse a block height that is no positive whole number or None.

    Raises:
      ValueError: naming the field and the value.
    """
    whole = isinstance(rows, int) and not isinstance(rows, bool) and rows >= 1
    if rows is not None and not whole:
        raise ValueError(
            f"{owner}.rows must be a whole number >= 1, or None for all features, "
            f"got {rows!r}"
        )
