"""BitNet b1.58: ternary weights (Ma et al., 2024).

https://arxiv.org/abs/2402.17764

    w_hat = gamma clip(round(w / gamma), -1, 1),  gamma = mean|w|      (eqs. 1 to 3)

with one gamma for each matrix, straight-through. Its activations have 8 bits for each
token, scaled by their largest magnitude over 127:
`StraightThrough(Int(8, token(), scale_rule="narrow"))`.
"""

from dataclasses import dataclass
from typing import Any

from jaxtyping import Array, Float32

from qjax.core.formats import Ternary, tensor
from qjax.core.granularity import Granularity
from qjax.core.scales import Grid
from qjax.train.quantizers import Trained, WeightQuantizer, check_granularity

_TENSOR = tensor()


@dataclass(frozen=True)
class BitNet(WeightQuantizer):
    """`{-1, 0, 1}` times the mean magnitude.

    Args:
      granularity: which weights share a scale; `tensor()`, as in the paper.

    Raises:
      ValueError: `granularity` is none.
    """

    granularity: Granularity = _TENSOR

    def __post_init__(self):
        check_granularity("BitNet", self.granularity)

    @property
    def weight_format(self) -> Ternary:
        """How the weights are stored."""
        return Ternary(self.granularity, scale_dtype="float32")

    def weight_grid(self, w: Any, trained: Trained) -> tuple[Any, Grid]:
        """Mean magnitudes."""
        return w, self.weight_format.fit(w)

    def weight_estimate(self, w: Float32[Array, "... K N"], trained: Trained) -> Any:
        """`w`."""
        return w
