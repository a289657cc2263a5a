"""ParetoQ: one quantizer for each of the lowest bit widths (Liu et al., 2025).

https://arxiv.org/abs/2502.02631

    1 bit:         alpha sign(w)                                elastic binarization
    1.58, 2 bits:  alpha q,  q = (round(n clip(w/alpha) - z) + z) / n            SEQ
    3, 4 bits:     LSQ

Stretched elastic quantization (SEQ) has `n = 2, z = 1/2` at 2 bits, so that the levels
are +-1/4 and +-3/4 of alpha and none is zero, and `n = 3/2, z = 0` at 1.58 bits. Inside
`|w/alpha| <= (n - z) / n` the gradients are `dw_hat/dw = 1` and `dw_hat/dalpha = q -
w/alpha`, outside 0 and the last level. At 1 bit they are `1[|w| <= alpha]` and
`sign(w)`. The gradient of alpha has LSQ's factor, of the weights that share it. The
start is `mean|w|` at 1 bit, `max|w|` at 1.58 and 2, and `max|w| / Q_P` above, as in the
reference implementation. That takes `max(alpha, 1e-5)`, passing the gradient on; here
alpha counts by its magnitude, of at least 2^-23 (`quantizers.positive`).
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from qjax.core.formats import Binary, Format, Int, Ternary, channel
from qjax.core.granularity import Granularity, block_sizes, to_blocks
from qjax.core.rounding import clamp, straight_through
from qjax.core.scales import Grid
from qjax.train.lsq import learned_step
from qjax.train.quantizers import (
    Trained,
    WeightQuantizer,
    block_mean,
    check_granularity,
    positive,
    scale_gradient,
    spread_over,
)

BITS = (1, 1.58, 2, 3, 4)
_CHANNEL = channel()


@dataclass(frozen=True)
class ParetoQ(WeightQuantizer):
    """Learned scales for 1 to 4 bits.

    Args:
      bits: 1, 1.58 (ternary), 2, 3 or 4.
      granularity: what shares a scale; `channel()`, one per output feature, as in the
        reference.

    Raises:
      ValueError: a field has an illegal value.
    """

    bits: int | float = 2
    granularity: Granularity = _CHANNEL

    def __post_init__(self):
        if self.bits not in BITS or isinstance(self.bits, bool):
            raise ValueError(f"ParetoQ.bits must be one of {BITS}, got {self.bits!r}")
        check_granularity("ParetoQ", self.granularity)

    @property
    def weight_format(self) -> Format:
        """How the weights are stored."""
        if self.bits == 1:
            return Binary(self.granularity, scale_dtype="float32")
        if self.bits == 1.58:
            return Ternary(self.granularity, scale_dtype="float32")
        zero = "float" if self.bits == 2 else "none"
        bits = int(self.bits)
        return Int(bits, self.granularity, zero=zero, scale_dtype="float32")

    @property
    def _most(self) -> int:
        """`Q_P`."""
        return 1 if self.bits < 2 else 2 ** (int(self.bits) - 1) - 1

    def init_weights(self, w: Float[Array, "... K N"]) -> Trained:
        """The reference's start."""
        size = jnp.abs(w.astype(jnp.float32))
        if self.bits == 1:
            return {"alpha": block_mean(size, self.granularity)}
        largest = to_blocks(size, self.granularity).max((-3, -1))
        return {"alpha": largest / np.float32(self._most if self.bits > 2 else 1)}

    def weight_grid(self, w: Any, trained: Trained) -> tuple[Any, Grid]:
        """The weights on the learned scales."""
        alpha = positive(trained["alpha"])
        if self.bits == 1.58:
            return w, Grid(alpha / np.float32(1.5))
        if self.bits == 2:
            return w, Grid(alpha / 2, jnp.full_like(alpha, 1.5))
        return w, Grid(alpha)

    def weight_estimate(self, w: Float32[Array, "... K N"], trained: Trained) -> Any:
        """The expression of the method for this many bits."""
        members = block_sizes(self.granularity, *w.shape[-2:]).astype(np.float32)
        alpha = trained["alpha"]
        if self.bits > 2:
            ends = (-self._most - 1, self._most)
            return learned_step(w, alpha, self.granularity, ends, members)
        alpha = scale_gradient(positive(alpha), 1 / np.sqrt(members * self._most))
        alpha = spread_over(alpha, self.granularity, w)
        if self.bits == 1:
            held = jax.lax.stop_gradient(alpha)
            return alpha * jnp.where(w < 0, -1, 1) + clamp(w, -held, held)
        return alpha * self._stretched(w / alpha)

    def _stretched(self, units: Float32[Array, "... K N"]) -> Any:
        """SEQ's level for `w / alpha`, straight-through up to the last one."""
        n, z = (2.0, 0.5) if self.bits == 2 else (1.5, 0.0)
        n, z = np.float32(n), np.float32(z)
        inner = clamp(units, -np.float32(0.99), np.float32(0.99))
        level = (jnp.round(inner * n - z) + z) / n
        last = (n - z) / n
        ends = jnp.where(units < -last, -last, last)
        inside = jnp.abs(units) <= last
        return jnp.where(inside, straight_through(units, level), ends)
