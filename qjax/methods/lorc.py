"""LoRC: low-rank compensation (ZeroQuant-V2, Yao et al., 2023).

https://arxiv.org/abs/2303.08302, section 5. The error of a quantized weight is
factored by its singular values, `U S V = SVD_r(W - Q)`, and what the factors give is
added: `L = U sqrt(S)`, `R = sqrt(S) V`. No data is needed. The paper also has factors
in 8 bits: `factors=Int(8)`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Array, Float, Float32

from qjax.core.lowrank import Factors, best_rank, each
from qjax.methods.base import Solution
from qjax.methods.reconstruction import Reconstruction


@dataclass(frozen=True)
class LoRC(Reconstruction):
    """Factors of the error of the weight: a repair, or rounding to nearest with one.

    Args:
      scheme: a named pair of formats; with it the weights are rounded to nearest first.
      weights: a weight format, in place of a scheme.
      activations: how the input of the coded weight is coded, beside `weights`; the
        factors take the input itself.
      calibrator: how a static activation range is found.
      rank: of the factors; 8, as in the paper. Of a start of adapters, theirs.
      factors: how they are coded, such as `Int(8)`; None keeps the weight's own type.
      targets: patterns of the sites; None takes all that are quantized.
      ignore: patterns of the sites to leave.

    Raises:
        ValueError: an unknown scheme, or a field out of range.
    """

    usual_rank = 8

    def factored(
        self, e: Float32[Array, "... K N"], rank: int, stats: Mapping[str, Any]
    ) -> Factors:
        """The largest singular values of the error."""
        return best_rank(e, rank)

    def solve(self, w: Float[Array, "... K N"], key: Any = None) -> Solution:
        """The weight rounded to nearest, and the factors of its error."""
        return each(lambda one: self.nearest(one, {}), w)
