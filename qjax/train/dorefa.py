"""DoReFa-Net: low bit widths for weights and activations (Zhou et al., 2016).

https://arxiv.org/abs/1606.06160

With `quantize_k(r) = round((2^k - 1) r) / (2^k - 1)`, straight-through (eq. 5):

    weights, k > 1:  2 quantize_k(tanh(w) / (2 max|tanh(w)|) + 1/2) - 1       (eq. 9)
    weights, k = 1:  sign(w) mean|w|                                          (eq. 7)
    activations:     quantize_k(clip(x, 0, 1))                                (eq. 11)

Maximum and mean are those of the layer. The paper also quantizes gradients (eq. 12),
which is not done here.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32

from qjax.core.formats import Binary, Format, Int, tensor
from qjax.core.qtensor import Activation
from qjax.core.rounding import clamp
from qjax.core.scales import Grid
from qjax.train.quantizers import (
    InputQuantizer,
    Trained,
    WeightQuantizer,
    check_bits,
)


def squashed(w: Float32[Array, "... K N"]) -> Float32[Array, "... K N"]:
    """`tanh(w) / max|tanh(w)|`, in [-1, 1]."""
    t = jnp.tanh(w)
    most = jnp.max(jnp.abs(t), axis=(-2, -1), keepdims=True)
    return t / jnp.where(most == 0, 1, most)


@dataclass(frozen=True)
class DoReFa(WeightQuantizer, InputQuantizer):
    """`k`-bit weights in [-1, 1], or `k`-bit activations in [0, 1].

    Args:
      bits: 1 to 8.

    Raises:
      ValueError: a field out of range.
    """

    bits: int = 4

    def __post_init__(self):
        check_bits("DoReFa", self.bits, 1, 8)

    @property
    def _steps(self) -> Any:
        return np.float32(2**self.bits - 1)

    @property
    def weight_format(self) -> Format:
        """How the weights are stored."""
        if self.bits == 1:
            return Binary(tensor(), scale_dtype="float32")
        return Int(self.bits, tensor(), zero="float", scale_dtype="float32")

    def weight_grid(self, w: Float32[Array, "... K N"], trained: Trained) -> Any:
        """`tanh(w) / max|tanh(w)|` on `2^k` even levels from -1 to 1."""
        if self.bits == 1:
            return w, self.weight_format.fit(w)
        scale = jnp.full((*w.shape[:-2], 1, 1), 2 / self._steps, jnp.float32)
        return squashed(w), Grid(scale, jnp.full_like(scale, self._steps / 2))

    def weight_estimate(self, w: Float32[Array, "... K N"], trained: Trained) -> Any:
        """`tanh(w) / max|tanh(w)|`; of one bit, `w`."""
        return w if self.bits == 1 else squashed(w)

    @property
    def activation(self) -> Activation:
        """How the input is coded."""
        zero = Int(self.bits, tensor(), symmetric=False, zero="int")
        return Activation(zero, dynamic=False)

    def input_grid(self, trained: Trained) -> Grid:
        """`2^k` even levels from 0 to 1."""
        scale = jnp.full((1, 1), 1 / self._steps, jnp.float32)
        return Grid(scale, jnp.zeros((1, 1), jnp.uint8))

    def input_estimate(self, x: Float32[Array, "... K M"], trained: Trained) -> Any:
        """`clip(x, 0, 1)`."""
        return clamp(x, np.float32(0), np.float32(1))
