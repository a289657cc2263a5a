"""The straight-through estimator (Bengio et al., 2013).

https://arxiv.org/abs/1308.3432

Forward the value rounded to any format, backward the gradient of the identity. Ranges
come from the weights, or from the batch, at hand.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float32

from qjax.core.formats import NVFP4, Format
from qjax.core.qtensor import Activation
from qjax.core.scales import MINMAX, MSE, AbsMax, Grid, MinMax, Percentile
from qjax.train.quantizers import InputQuantizer, Trained, WeightQuantizer


@dataclass(frozen=True)
class StraightThrough(WeightQuantizer, InputQuantizer):
    """Any format, straight-through.

    Args:
      format: of weights, such as `Int(4, group(128))`, or of activations, with dynamic
        ranges, such as `Int(8, token())`.
      search: how the range of each group of weights is chosen; activations have the
        range of the batch.
      rounding: of weights, "nearest" or "stochastic"; stochastic where `f_qat` is given
        a key. The finished model has the nearest codes.

    Raises:
      ValueError: a field has an illegal value.
    """

    format: Any
    search: Any = MINMAX
    rounding: str = "nearest"

    def __post_init__(self):
        if not isinstance(self.format, Format):
            raise ValueError(
                "StraightThrough.format must be a format such as Int(4, group(128)), "
                f"got {self.format!r}"
            )
        if not isinstance(self.search, (MinMax, AbsMax, Percentile, MSE)):
            raise ValueError(
                "StraightThrough.search must be MinMax, AbsMax, Percentile or MSE, "
                f"got {self.search!r}"
            )
        if self.rounding not in ("nearest", "stochastic"):
            raise ValueError(
                'StraightThrough.rounding must be "nearest" or "stochastic", '
                f"got {self.rounding!r}"
            )

    @property
    def weight_format(self) -> Format:
        """How the weights are stored."""
        return self.format

    def weight_grid(self, w: Float32[Array, "... K N"], trained: Trained) -> Any:
        """The grid that fits the weights as they now are."""
        if isinstance(self.format, NVFP4) and trained:
            second = self.format.global_scale(trained["largest"])
            return w, self.format.fit(w, self.search, global_scale=second)
        return w, self.format.fit(w, self.search)

    def shared(self, w: Float32[Array, "... K N"]) -> Trained:
        """Of NVFP4 the largest magnitude, which the second scale is made of."""
        if not isinstance(self.format, NVFP4):
            return {}
        return {"largest": self.format.largest(w, self.search)}

    def weight_estimate(self, w: Float32[Array, "... K N"], trained: Trained) -> Any:
        """`w`."""
        return w

    @property
    def activation(self) -> Activation:
        """How the input is coded."""
        if self.rounding != "nearest":
            raise ValueError(
                f"StraightThrough.rounding is {self.rounding!r}, which is for weights; "
                "activations are rounded to nearest"
            )
        if not isinstance(self.search, MinMax):
            raise ValueError(
                f"StraightThrough.search is {self.search!r}, which is for weights; "
                "activations have the range of the batch at hand"
            )
        return Activation(self.format)

    def input_grid(self, trained: Trained) -> Grid | None:
        """Each batch has its own."""
        return None

    def input_estimate(self, x: Float32[Array, "... K M"], trained: Trained) -> Any:
        """`x`."""
        return jnp.asarray(x)
