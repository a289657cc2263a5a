"""LoftQ: codes and low-rank factors, found in turns (Li et al., ICLR 2024).

https://arxiv.org/abs/2310.08659, algorithm 1. Alternates between coding what the
factors leave, `Q = q(W - L R)`, and the best factors of what the codes leave,
`L R = SVD_r(W - Q)`, from `L R = 0`. The paper makes starts of adapters of it
(`qjax.initialise_lora`); as a method of its own the factors stay as they are.
"""

from dataclasses import KW_ONLY, dataclass
from typing import Any

from jaxtyping import Array, Float, Float32

from qjax.core.coded import Coded
from qjax.core.formats import Format
from qjax.core.lowrank import coded_and_best_rank, each, kept
from qjax.methods.base import Solution, check_format, positive_integer
from qjax.methods.reconstruction import check_start
from qjax.methods.shared import Formatted
from qjax.schemes import Scheme, scheme


@dataclass(frozen=True)
class LoftQ(Formatted):
    """LoftQ.

    Args:
      scheme: a named pair of formats; "NF4" is the default, as in the paper.
      weights: a weight format, in place of a scheme.
      activations: how the input of the coded weight is coded, beside `weights`; the
        factors take the input itself.
      calibrator: how a static activation range is found.
      rank: of the factors; 16. Of a start of adapters, theirs.
      factors: how they are coded; None keeps the weight's own type.
      iters: turns; 5, as in the paper.
      targets: patterns of the sites to take; None takes all but the head, routers and
        embeddings.
      ignore: patterns of the sites to leave.

    Raises:
        ValueError: an unknown scheme, or a field out of range.
    """

    _: KW_ONLY
    rank: int | None = None
    factors: Format | None = None
    iters: int = 5

    def __post_init__(self):
        super().__post_init__()
        positive_integer("LoftQ", "iters", self.iters)
        if self.rank is not None:
            positive_integer("LoftQ", "rank", self.rank)
        check_format("LoftQ", "factors", self.factors)

    @property
    def formats(self) -> Scheme:
        """The pair of formats."""
        own = self.scheme is not None or self.weights is not None
        return super().formats if own else scheme("NF4")

    def solve(self, w: Float[Array, "... K N"], key: Any = None) -> Solution:
        """The coded weight, and the factors beside it."""
        return each(self._solve, w)

    def _solve(self, w: Float[Array, "K N"]) -> Solution:
        found = coded_and_best_rank(w, self.format, self.rank or 16, self.iters)
        coded, *pair = found
        left, right = (kept(each, self.factors, w.dtype) for each in pair)
        return Solution((coded,), left=left, right=right)

    @property
    def statistic(self) -> None:
        """A start of adapters needs the weights alone."""

    def split(
        self, w: Float32[Array, "K N"], rank: int, known: Any
    ) -> tuple[Coded, Any, Any]:
        """A start of adapters: codes and factors with `Q + L R` near to `w`.

        Raises:
            ValueError: a rank that is not the adapters', or coded factors.
        """
        check_start(self, rank)
        return coded_and_best_rank(w, self.format, rank, self.iters)
