"""GPTAQ: GPTQ that also makes up for the drift of its input (Li et al., 2025).

https://arxiv.org/abs/2504.02692. What a quantized layer should match is its output in
the full-precision model, `X~ W`, while its input is `X`: the features of the input have
drifted by `d_q = x~_q - x_q`. While feature `q` is rounded, the features after it also
make up for `d_q w_q`, by least squares. With `C = E[d x^T]`, `H^-1 = U^T U`, the term
added to `w_j` is

    alpha sum_{q<j} P[q, j] w_q,   P = triu(C U^T, 1) U.

Written from the equations. The weights `w_q` of the term are the original ones: it is
`X~ W` with the original weights that should be met, and the term is then a shift of the
target, `W + alpha P^T W`, which GPTQ sweeps as ever (the published loop reads the
weights that earlier steps have moved). Everything else is GPTQ's.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Array, Float

from qjax.core.statistics import Cross, Hessian, Statistic
from qjax.methods.base import Solution, within
from qjax.methods.shared import Sweeping


@dataclass(frozen=True)
class GPTAQ(Sweeping):
    """GPTAQ.

    Args:
      scheme: a named pair of formats; "W4A16" is the default.
      weights: a weight format, in place of a scheme.
      activations: how the input of the contraction is coded, beside `weights`.
      calibrator: how a static activation range is found; None is `MinMaxRange()`.
      search: how the range of each group is chosen.
      damping: share of the mean diagonal added to the Hessian's (`dampening_frac`,
        `percdamp`); 0.01, as in the paper. Tens of it are tried where that fails.
      block_size: rows whose error is passed on together; 128, as in the paper. It
        changes no code.
      act_order: which feature is rounded first, one of GPTQ's orders.
      importance: weigh the error of an `MSE` search by `E[x^2]` (imatrix).
      alpha: how much of the drift is made up for, in (0, 1]; 0.25, as in GPTQModel.
      targets: patterns of the sites to take; None takes all but the head, routers and
        embeddings.
      ignore: patterns of the sites to leave.

    Raises:
        ValueError: an unknown name, a field out of range, `scheme` beside a format, or
            `importance` with a search that measures no error.
        TypeError: `calibrator` is none.
    """

    alpha: float | int = field(default=0.25, kw_only=True)

    def __post_init__(self):
        within("GPTAQ", "alpha", self.alpha, 0, 1)
        super().__post_init__()

    @property
    def statistics(self) -> dict[str, Statistic]:
        """The Hessian, and how far the input has drifted."""
        return {"hessian": Hessian(), "cross": Cross()}

    @property
    def full_precision(self) -> bool:
        """The full-precision input is what the drift is measured against."""
        return True

    def solve_site(
        self, w: Float[Array, "K N"], stats: Mapping[str, Any], key: Any = None
    ) -> Solution:
        """The coded weights, in one part; `t_in` where groups were formed in order."""
        return self.swept(w, stats["hessian"], stats["cross"], self.alpha)
