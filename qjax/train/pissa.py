"""PiSSA and QPiSSA: principal singular values adaptation (Meng et al., NeurIPS 2024).

https://arxiv.org/abs/2404.02948

The factors start as the largest `r` singular triplets of the weight, the rest is
frozen: `A = U sqrt(S)`, `B = sqrt(S) V`, `W_res = W - A B` (eqs. 2 to 4), coded in
QPiSSA.
"""

from dataclasses import dataclass
from typing import Any

from jaxtyping import Array, Float32

from qjax.core.coded import encode
from qjax.core.formats import Format
from qjax.core.lowrank import best_rank
from qjax.methods.base import check_format


@dataclass(frozen=True)
class PiSSA:
    """The largest singular values are trained.

    Args:
      weights: how the rest is stored; None leaves it in float.

    Raises:
      ValueError: `weights` is no format.
    """

    weights: Format | None = None

    def __post_init__(self):
        check_format("PiSSA", "weights", self.weights)

    @property
    def statistic(self) -> None:
        """It needs the weights alone."""

    def split(self, w: Float32[Array, "K N"], rank: int, known: Any) -> Any:
        """The rest, and the factors of the largest singular values."""
        left, right = best_rank(w, rank)
        rest = w - left @ right
        base = rest if self.weights is None else encode(rest, self.weights)
        return base, left, right
