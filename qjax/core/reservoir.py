"""A sample of raw inputs, for methods that measure the error of real outputs."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float32, Int, UInt32

from qjax.core.pytrees import register
from qjax.core.statistics import counted


@dataclass(frozen=True)
class Drawn:
    """Rows kept so far, by falling priority; a priority of 0 is an empty place."""

    rows: Any
    priority: Any
    seen: Any
    bad: Any


register(Drawn, ("rows", "priority", "seen", "bad"))


@dataclass(frozen=True)
class Sample:
    """Input rows `rows[size, K]`; `weight[size]` is 0 where there were fewer."""

    rows: Any
    weight: Any


register(Sample, ("rows", "weight"))


@dataclass(frozen=True)
class Reservoir:
    """A uniform sample of `size` tokens, drawn without replacement.

    Each token that counts takes a pseudo-random priority from its number in the stream
    and `seed`; those of largest priority stay. So the sample does not depend on how the
    tokens are cut into batches, nor on their values. Shards that are merged should
    differ in `seed`: tokens of one number would be drawn together.

    Args:
      size: tokens kept.
      seed: another one, another sample.

    Raises:
      ValueError: a field is not a whole number in its range.
    """

    size: int = 512
    seed: int = 0

    def __post_init__(self):
        for field, least in (("size", 1), ("seed", 0)):
            value = getattr(self, field)
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not whole or not least <= value < 2**32:
                raise ValueError(
                    f"Reservoir.{field} must be a whole number >= {least}, "
                    f"got {value!r}"
                )

    def init(self, K: int) -> Drawn:
        """No tokens."""
        rows = jnp.zeros((self.size, K), jnp.float32)
        none = jnp.zeros(self.size, jnp.uint32)
        return Drawn(rows, none, jnp.zeros((), jnp.uint32), jnp.zeros((), jnp.float32))

    def update(self, state: Drawn, x: Any, weight: Any, full: Any = None) -> Drawn:
        """With the tokens of a batch."""
        x, counts = counted(x, weight), weight > 0
        bad = jnp.sum(~jnp.isfinite(x).all(1), dtype=jnp.float32)
        ranks = jnp.cumsum(counts, dtype=jnp.uint32)
        priority = self._priority(state.seen + ranks - np.uint32(1), counts)
        return self.merge(state, Drawn(x, priority, ranks[-1], bad))

    def _priority(
        self, number: UInt32[Array, " M"], counts: Bool[Array, " M"]
    ) -> UInt32[Array, " M"]:
        # Far from any number, or tokens a and b of shards b and a would be alike.
        seed = scrambled(~jnp.asarray(self.seed, jnp.uint32))
        priority = scrambled(scrambled(number) ^ seed)
        return jnp.where(counts, jnp.maximum(priority, np.uint32(1)), np.uint32(0))

    def merge(self, a: Drawn, b: Drawn) -> Drawn:
        """The rows of largest priority among both."""
        both = jnp.concatenate([a.priority, b.priority])
        priority, place = lax.top_k(both, self.size)
        rows = jnp.where(
            (place < a.priority.size)[:, None],
            _rows(a.rows, place),
            _rows(b.rows, place - a.priority.size),
        )
        rows = jnp.where(priority[:, None] > 0, rows, np.float32(0))
        return Drawn(rows, priority, a.seen + b.seen, a.bad + b.bad)

    def finalize(self, state: Drawn) -> Sample:
        """The sample; every weight is NaN if any token held a NaN or an infinity."""
        weight = (state.priority > 0).astype(jnp.float32)
        return Sample(state.rows, jnp.where(state.bad > 0, jnp.nan, weight))


def _rows(x: Float32[Array, "n K"], place: Int[Array, " size"]) -> Array:
    return x[jnp.clip(place, 0, x.shape[0] - 1)]


def scrambled(x: UInt32[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    """A fixed pseudo-random permutation of the 32-bit numbers (C. Wellons' lowbias32).

    https://nullprogram.com/blog/2018/07/31
    """
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))
