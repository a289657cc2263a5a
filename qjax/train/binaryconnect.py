"""BinaryConnect (Courbariaux et al., NeurIPS 2015).

https://arxiv.org/abs/1511.00363

Weights are `+-H` in both passes, by their sign (eq. 1) or at random, `+H` with
probability `clip((w/H + 1) / 2, 0, 1)` (eqs. 2, 3); the gradient goes to the real
weights as it is. The paper clips the real weights to `[-H, H]` after each update
(`optax.projections.projection_box`).
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32

from qjax.core.formats import Binary, tensor
from qjax.core.scales import Grid
from qjax.methods.base import within
from qjax.train.quantizers import Trained, WeightQuantizer


@dataclass(frozen=True)
class BinaryConnect(WeightQuantizer):
    """Signs of the weights.

    Args:
      rounding: "nearest" (the sign) or "stochastic", where `f_qat` is given a key.
      scale: `H`; 1 in the paper.

    Raises:
      ValueError: a field has an illegal value.
    """

    rounding: str = "nearest"
    scale: float | int = 1.0

    def __post_init__(self):
        if self.rounding not in ("nearest", "stochastic"):
            raise ValueError(
                'BinaryConnect.rounding must be "nearest" or "stochastic", '
                f"got {self.rounding!r}"
            )
        within("BinaryConnect", "scale", self.scale, 0, np.inf)

    @property
    def weight_format(self) -> Binary:
        """How the weights are stored."""
        return Binary(tensor(), scale_dtype="float32")

    def weight_grid(self, w: Any, trained: Trained) -> tuple[Any, Grid]:
        """The weights' signs times `H`."""
        return w, Grid(jnp.full((*w.shape[:-2], 1, 1), self.scale, jnp.float32))

    def weight_estimate(self, w: Float32[Array, "... K N"], trained: Trained) -> Any:
        """`w`."""
        return w
