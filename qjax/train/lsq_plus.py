"""LSQ+: learnable offsets and better initialization (Bhalgat et al., CVPR-W 2020).

https://arxiv.org/abs/2004.09576

Activations have an offset `b` that is learned with the step (eqs. 4 to 6):

    x_hat = round(clip((x - b) / s, 0, 2^bits - 1)) * s + b

Weights are LSQ's, symmetric, with the step started at
`max(|mean - 3 std|, |mean + 3 std|) / 2^(bits-1)`. Activations are started so that the
grid reaches from the smallest to the largest value; the paper then refines that start
by the squared error of the first batches, which is left to training here. The gradients
of step and offset have LSQ's factor.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from qjax.core.formats import Int, tensor
from qjax.core.granularity import Granularity, block_sizes
from qjax.core.qtensor import Activation
from qjax.core.scales import Grid
from qjax.train.lsq import features, learned_step
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


@dataclass(frozen=True)
class LSQPlus(WeightQuantizer, InputQuantizer):
    """LSQ with a learned offset of activations, and another start of weights.

    Args:
      bits: 2 to 8.
      granularity: what shares a step; `tensor()`, as in the paper.

    Raises:
      ValueError: a field out of range.
    """

    bits: int = 4
    granularity: Granularity = _TENSOR

    learns = True

    def __post_init__(self):
        check_bits("LSQPlus", self.bits, 2, 8)
        check_granularity("LSQPlus", self.granularity)

    @property
    def weight_format(self) -> Int:
        """How the weights are stored."""
        return Int(self.bits, self.granularity, scale_dtype="float32")

    def init_weights(self, w: Float[Array, "... K N"]) -> Trained:
        """The step of eq. 7."""
        w = w.astype(jnp.float32)
        mean = block_mean(w, self.granularity)
        centred = w - spread_over(mean, self.granularity, w)
        spread = 3 * jnp.sqrt(block_mean(jnp.square(centred), self.granularity))
        reach = jnp.maximum(jnp.abs(mean - spread), jnp.abs(mean + spread))
        return {"step": reach / np.float32(2 ** (self.bits - 1))}

    def weight_grid(self, w: Any, trained: Trained) -> tuple[Any, Grid]:
        """The weights on the learned steps."""
        return w, Grid(positive(trained["step"]))

    def weight_estimate(self, w: Float32[Array, "... K N"], trained: Trained) -> Any:
        """`round(clip(w / s)) s`."""
        half = 2 ** (self.bits - 1)
        members = block_sizes(self.granularity, *w.shape[-2:]).astype(np.float32)
        step = trained["step"]
        return learned_step(w, step, self.granularity, (-half, half - 1), members)

    @property
    def activation(self) -> Activation:
        """How the input is coded: the offset is `-zero * scale`."""
        check_static_granularity("LSQPlus", self.granularity)
        format = Int(self.bits, self.granularity, symmetric=False, zero="float")
        return Activation(format, dynamic=False)

    def init_inputs(self, seen: Seen | None, lead: tuple[int, ...]) -> Trained:
        """From the smallest to the largest value of the first batches (eq. 8)."""
        assert seen is not None
        width = (seen.high - seen.low) / np.float32(2**self.bits - 1)
        return {"step": jnp.where(width > 0, width, 1), "offset": seen.low}

    def input_grid(self, trained: Trained) -> Grid:
        """The learned steps; the zero point is `-offset / step`."""
        step = positive(trained["step"])
        return Grid(step, -trained["offset"] / step)

    def input_estimate(self, x: Float32[Array, "... K M"], trained: Trained) -> Any:
        """`round(clip((x - b) / s)) s + b`."""
        ends, members = (0, 2**self.bits - 1), features(self.granularity, x.shape[-2])
        factor = 1 / np.sqrt(members * ends[1])
        offset = scale_gradient(trained["offset"], factor)
        offset = spread_over(offset, self.granularity, x)
        step = trained["step"]
        return learned_step(x - offset, step, self.granularity, ends, members) + offset
