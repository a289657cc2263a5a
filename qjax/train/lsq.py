"""LSQ: Learned Step Size Quantization (Esser et al., ICLR 2020).

https://arxiv.org/abs/1902.08153

    v = clip(x / s, -Q_N, Q_P),   x_hat = round(v) * s                   (eqs. 1, 2)
    dx_hat/ds = round(x/s) - x/s inside, -Q_N or Q_P at the ends         (eq. 3)
    dx_hat/dx = 1 inside, 0 outside                                      (eq. 5)

with the gradient of `s` multiplied by `1 / sqrt(n Q_P)` (section 2.2), where `n` is the
number of weights, or of features, that share the step. The paper has one step for each
layer; here `granularity` says which weights share one. A step counts by its magnitude,
of at least 2^-23 (`quantizers.positive`).
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from qjax.core.formats import Int, tensor
from qjax.core.granularity import Granularity, block_sizes
from qjax.core.qtensor import Activation
from qjax.core.rounding import clamp, round_ste
from qjax.core.scales import Grid
from qjax.train.quantizers import (
    InputQuantizer,
    Seen,
    Trained,
    WeightQuantizer,
    block_mean,
    check_bits,
    check_granularity,
    check_static_granularity,
    positive,
    scale_gradient,
    spread_over,
)

_TENSOR = tensor()


def learned_step(
    x: Float32[Array, "... K N"],
    step: Float32[Array, "... Gk Gn"],
    granularity: Granularity,
    ends: tuple[int, int],
    members: Any,
) -> Float32[Array, "... K N"]:
    """`round(clip(x / s, *ends)) * s` with the gradients of eqs. 3 and 5.

    `members[Gk, Gn]` is how many values count for the gradient scale of each step.
    """
    low, high = ends
    step = scale_gradient(positive(step), 1 / np.sqrt(members * max(high, 1)))
    s = spread_over(step, granularity, x)
    return round_ste(clamp(x / s, np.float32(low), np.float32(high))) * s


def features(granularity: Granularity, K: int) -> np.ndarray:
    """How many features share each step, `[G, 1]`: `n` of an activation's step."""
    return block_sizes(granularity, K, 1).astype(np.float32)


@dataclass(frozen=True)
class LSQ(WeightQuantizer, InputQuantizer):
    """Learned step size, for weights or for activations.

    Args:
      bits: 2 to 8.
      granularity: what shares a step; `tensor()`, one per layer, as in the paper.
      unsigned: activations of at least 0 (after a ReLU): codes `0 .. 2^bits - 1`.

    Raises:
      ValueError: a field out of range.
    """

    bits: int = 4
    granularity: Granularity = _TENSOR
    unsigned: bool = False

    learns = True

    def __post_init__(self):
        check_bits("LSQ", self.bits, 2, 8)
        check_granularity("LSQ", self.granularity)

    @property
    def ends(self) -> tuple[int, int]:
        """`(-Q_N, Q_P)`."""
        if self.unsigned:
            return 0, 2**self.bits - 1
        return -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1

    @property
    def weight_format(self) -> Int:
        """How the weights are stored."""
        if self.unsigned:
            raise ValueError("LSQ.unsigned is for activations; weights have a sign")
        return Int(self.bits, self.granularity, scale_dtype="float32")

    def init_weights(self, w: Float[Array, "... K N"]) -> Trained:
        """`s = 2 mean|w| / sqrt(Q_P)` (section 2.1)."""
        mean = block_mean(jnp.abs(w.astype(jnp.float32)), self.granularity)
        return {"step": 2 * mean / np.float32(np.sqrt(self.ends[1]))}

    def weight_grid(self, w: Any, trained: Trained) -> tuple[Any, Grid]:
        """The weights on the learned steps."""
        return w, Grid(positive(trained["step"]))

    def weight_estimate(self, w: Float32[Array, "... K N"], trained: Trained) -> Any:
        """`round(clip(w / s)) s`."""
        members = block_sizes(self.granularity, *w.shape[-2:]).astype(np.float32)
        return learned_step(w, trained["step"], self.granularity, self.ends, members)

    @property
    def activation(self) -> Activation:
        """How the input is coded."""
        check_static_granularity("LSQ", self.granularity)
        if not self.unsigned:
            return Activation(Int(self.bits, self.granularity), dynamic=False)
        zero = Int(self.bits, self.granularity, symmetric=False, zero="int")
        return Activation(zero, dynamic=False)

    def init_inputs(self, seen: Seen | None, lead: tuple[int, ...]) -> Trained:
        """`s = 2 mean|x| / sqrt(Q_P)` of the first batches; 1 of zeros."""
        assert seen is not None
        mean = seen.magnitude / jnp.maximum(seen.count, 1)
        step = 2 * mean / np.float32(np.sqrt(self.ends[1]))
        return {"step": jnp.where(step > 0, step, 1)}

    def input_grid(self, trained: Trained) -> Grid:
        """The learned steps; an unsigned grid starts at 0."""
        step = positive(trained["step"])
        return Grid(step, jnp.zeros(step.shape, jnp.uint8) if self.unsigned else None)

    def input_estimate(self, x: Float32[Array, "... K M"], trained: Trained) -> Any:
        """`round(clip(x / s)) s`."""
        members = features(self.granularity, x.shape[-2])
        return learned_step(x, trained["step"], self.granularity, self.ends, members)
