"""PACT: Parameterized Clipping Activation (Choi et al., 2018).

https://arxiv.org/abs/1805.06085

    y = clip(x, 0, alpha),   y_hat = round(y (2^bits - 1) / alpha) alpha / (2^bits - 1)

with `dy_hat/dalpha = 1` where `x >= alpha`, else 0 (eq. 3), and `dy_hat/dx = 1` between
0 and alpha. The paper adds `lambda alpha^2` to the loss, with the weights' own decay:
decay `qstate.trained` likewise. It takes DoReFa for the weights. A level that training
drives below zero counts by its magnitude (`quantizers.positive`).
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32

from qjax.core.formats import Int, tensor
from qjax.core.qtensor import Activation
from qjax.core.scales import Grid
from qjax.methods.base import within
from qjax.train.quantizers import InputQuantizer, Seen, Trained, check_bits, positive


@dataclass(frozen=True)
class PACT(InputQuantizer):
    """A learned clipping level for activations.

    Args:
      bits: 1 to 8, from 2 if signed.
      alpha: where the clipping level starts; one below the largest activation clips
        from the first step on.
      signed: clip to `[-alpha, alpha]`, for inputs that no ReLU made; the paper's
        activations are at least 0.

    Raises:
      ValueError: a field out of range.
    """

    bits: int = 4
    alpha: float | int = 10.0
    signed: bool = False

    def __post_init__(self):
        check_bits("PACT", self.bits, 2 if self.signed else 1, 8)
        within("PACT", "alpha", self.alpha, 0, np.inf)

    @property
    def activation(self) -> Activation:
        """How the input is coded."""
        if self.signed:
            narrow = Int(self.bits, tensor(), scale_rule="narrow")
            return Activation(narrow, dynamic=False)
        zero = Int(self.bits, tensor(), symmetric=False, zero="int")
        return Activation(zero, dynamic=False)

    def init_inputs(self, seen: Seen | None, lead: tuple[int, ...]) -> Trained:
        """`alpha`, for each layer."""
        return {"alpha": jnp.full((*lead, 1, 1), self.alpha, jnp.float32)}

    def input_grid(self, trained: Trained) -> Grid:
        """Levels from 0, or `-alpha`, to `alpha`."""
        alpha = positive(trained["alpha"])
        if self.signed:
            return Grid(alpha / np.float32(2 ** (self.bits - 1) - 1))
        zero = jnp.zeros(alpha.shape, jnp.uint8)
        return Grid(alpha / np.float32(2**self.bits - 1), zero)

    def input_estimate(self, x: Float32[Array, "... K M"], trained: Trained) -> Any:
        """`clip(x, 0, alpha)`."""
        alpha = positive(trained["alpha"])
        low = -alpha if self.signed else jnp.zeros_like(alpha)
        return jnp.where(x < low, low, jnp.where(x >= alpha, alpha, x))
