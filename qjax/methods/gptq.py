"""GPTQ: rounding with second-order error compensation (Frantar et al., 2022).

https://arxiv.org/abs/2210.17323, equations 2-4 and algorithm 1. The features of
`w[K, N]` are rounded one after the other; each error is passed on to the features not
yet rounded so that the output changes least, `tr(D^T H D)` for `D = w - q`,
`H = E[x x^T]`:

    w_j <- w_j - U[i, j] (w_i - q_i) / U[i, i]   for all j > i,   H^-1 = U^T U.

Differences from the reference implementation (IST-DASLab/gptq): no inverse is formed
(`core/compensate.py`); a Hessian that is not positive definite with the damping asked
for gets ten times as much, and again, in place of a crash; a matrix of which no feature
was ever used is rounded to nearest, not set to zero; the default order is
llm-compressor's ("static"). A dead feature counts in neither the mean diagonal nor, its
weights being zero, the range of its group.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Array, Float

from qjax.core.statistics import Hessian, Statistic
from qjax.methods.base import Solution
from qjax.methods.shared import Sweeping


@dataclass(frozen=True)
class GPTQ(Sweeping):
    """GPTQ.

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
      act_order: which feature is rounded first. "off" (or None): the first, scales
        fitted to the weights as the sweep reaches their group, as in the paper.
        "static" (llm-compressor's default): the one of largest `H[j, j]`, scales fitted
        to the original weights. "dynamic" (the reference's `act_order`): the same
        order, groups formed in it, which leaves a permutation of the input. "group"
        (GPTQModel's group-aware order): whole groups by their largest `H[j, j]`, and
        the features inside each.
      importance: weigh the error of an `MSE` search by `E[x^2]` (imatrix).
      targets: patterns of the sites to take; None takes all but the head, routers and
        embeddings.
      ignore: patterns of the sites to leave.

    Raises:
        ValueError: an unknown name, a field out of range, `scheme` beside a format, or
            `importance` with a search that measures no error.
        TypeError: `calibrator` is none.
    """

    @property
    def statistics(self) -> dict[str, Statistic]:
        """The Hessian."""
        return {"hessian": Hessian()}

    def solve_site(
        self, w: Float[Array, "K N"], stats: Mapping[str, Any], key: Any = None
    ) -> Solution:
        """The coded weights, in one part; `t_in` where groups were formed in order."""
        return self.swept(w, stats["hessian"])
