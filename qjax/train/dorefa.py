"""DoReFa-Net: low bit widths for weights and activations (Zhou et al., 2016).

https://arxiv.org/abs/1606.06160

With `quantize_k(r) = round((2^k - 1) r) / (2^k - 1)`, straight-through (eq. 5):

    weights, k > 1:  2 quantize_k(tanh(w) / (2 max|tanh(w)|) + 1/2) - 1       (eq. 9)
    weights, k = 1:  sign(w) mean|w|                                          (eq. 7)
    activations:     quantize_k(clip(x, 0, 1))                                (eq. 11)

Maximum and mean are those of the layer. The gradient of what a site gives out, before
it goes back through the site, with noise `N = u / (2^k - 1)`, `u` even in [-1/2, 1/2]:

    2 m [quantize_k(d / (2 m) + 1/2 + N) - 1/2]                               (eq. 12)

where `m = max|d|` over each example of the batch, the first axis.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

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


@dataclass(frozen=True)
class DoReFaGradients:
    """`k`-bit gradients, for `QAT(..., gradients=DoReFaGradients(6))`.

    Args:
      bits: 2 to 8; 6, as in most of the paper's results.

    Raises:
      ValueError: a field out of range.
    """

    bits: int = 6

    def __post_init__(self):
        check_bits("DoReFaGradients", self.bits, 2, 8)

    def __call__(self, y: Float[Array, "B ..."], key: Any) -> Float[Array, "B ..."]:
        """`y`, whose gradient is rounded on the way back.

        Without a key there is no noise, and gradients stay as they are.
        """
        return y if key is None else _rounded_back(y, key, self.bits)


def rounded_gradient(
    d: Float[Array, "B ..."], key: Any, bits: int
) -> Float[Array, "B ..."]:
    """Eq. 12."""
    wide, steps = d.astype(jnp.float32), np.float32(2**bits - 1)
    most = jnp.max(jnp.abs(wide), axis=tuple(range(1, d.ndim)), keepdims=True)
    safe = jnp.where(most == 0, 1, most)
    noise = jax.random.uniform(key, d.shape, jnp.float32, -0.5, 0.5)
    levels = jnp.round((wide / (2 * safe) + 0.5) * steps + noise) / steps
    return (2 * most * (levels - 0.5)).astype(d.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _rounded_back(y: Any, key: Any, bits: int) -> Any:
    return y


def _forward(y: Any, key: Any, bits: int) -> tuple[Any, Any]:
    return y, key


def _backward(bits: int, key: Any, d: Any) -> tuple[Any, None]:
    return rounded_gradient(d, key, bits), None


_rounded_back.defvjp(_forward, _backward)
