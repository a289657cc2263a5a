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
from dataclasses import dataclass
from typing import Any

from jaxtyping import Array, Float

from qjax.core.coded import pack_codes
from qjax.core.formats import Format
from qjax.core.qtensor import Activation
from qjax.core.ranges import MINMAX_RANGE, check_calibrator
from qjax.core.scales import MINMAX, MSE, Search
from qjax.core.statistics import Cross, Hessian, Statistic
from qjax.core.sweep import ORDERS, Sweep, columns_alone, sweep
from qjax.core.transforms import Permutation
from qjax.methods.base import Solution, check_patterns, positive_integer, within
from qjax.schemes import Scheme, scheme


@dataclass(frozen=True)
class GPTAQ:
    """GPTAQ.

    Args:
      alpha: how much of the drift is made up for, in (0, 1]; 0.25, as in GPTQModel.
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
      targets: patterns of the sites to take; None takes all but the head, routers and
        embeddings.
      ignore: patterns of the sites to leave.

    Raises:
        ValueError: an unknown name, a field out of range, `scheme` beside a format, or
            `importance` with a search that measures no error.
        TypeError: `calibrator` is none.
    """

    alpha: float | int = 0.25
    scheme: str | None = None
    weights: Format | None = None
    activations: Activation | None = None
    calibrator: Any = None
    search: Search = MINMAX
    damping: float | int = 0.01
    block_size: int = 128
    act_order: str | None = "static"
    importance: bool = False
    targets: str | tuple[str, ...] | None = None
    ignore: str | tuple[str, ...] = ()

    def __post_init__(self):
        check_patterns("GPTAQ", self.targets, self.ignore)
        within("GPTAQ", "alpha", self.alpha, 0, 1)
        within("GPTAQ", "damping", self.damping, 0, 100)
        positive_integer("GPTAQ", "block_size", self.block_size)
        if self.act_order not in (None, *ORDERS):
            raise ValueError(
                f"GPTAQ.act_order must be None or one of {ORDERS}, "
                f"got {self.act_order!r}"
            )
        if self.importance and not isinstance(self.search, MSE):
            raise ValueError(
                "GPTAQ.importance needs a search that measures an error, "
                f"GPTAQ.search=MSE(), got {self.search!r}"
            )
        self._check_formats()

    def _check_formats(self):
        given = [f for f in ("weights", "activations") if getattr(self, f) is not None]
        if self.scheme is not None and given:
            raise ValueError(
                f"GPTAQ.scheme {self.scheme!r} already says the formats; leave out "
                f"{' and '.join(given)}"
            )
        if given == ["activations"]:
            raise ValueError("GPTAQ.activations needs GPTAQ.weights beside it")
        static = self.activation is not None and not self.activation.dynamic
        if self.calibrator is not None and not static:
            raise ValueError(
                f"GPTAQ.calibrator {self.calibrator!r} has nothing to calibrate: no "
                "activation range is static; leave it out"
            )
        check_calibrator("GPTAQ", self.calibrator or MINMAX_RANGE, self.activation)

    @property
    def formats(self) -> Scheme:
        """The pair of formats."""
        if self.weights is not None:
            return Scheme(self.weights, self.activations)
        return scheme(self.scheme or "W4A16")

    @property
    def format(self) -> Format:
        """How the weights are stored."""
        return self.formats.weights

    @property
    def activation(self) -> Activation | None:
        """How the input of the contraction is coded."""
        return self.formats.activations

    @property
    def random(self) -> bool:
        """GPTAQ draws no random numbers."""
        return False

    @property
    def statistics(self) -> dict[str, Statistic]:
        """The Hessian, and how far the input has drifted."""
        return {"hessian": Hessian(), "cross": Cross()}

    @property
    def full_precision(self) -> bool:
        """The full-precision input is what the drift is measured against."""
        return True

    @property
    def shared(self) -> bool:
        """Whether columns are independent."""
        return columns_alone(self.format)

    @property
    def sweep(self) -> Sweep:
        """How a matrix is swept."""
        return Sweep(
            self.format,
            self.search,
            float(self.damping),
            self.block_size,
            self.act_order or "off",
            self.importance,
        )

    def solve_site(
        self, w: Float[Array, "K N"], stats: Mapping[str, Any], key: Any = None
    ) -> Solution:
        """The coded weights, in one part; `t_in` where groups were formed in order."""
        found = sweep(
            w, stats["hessian"], self.sweep, stats["cross"], float(self.alpha)
        )
        part = pack_codes(found.codes, found.grid, self.format, w.shape)
        order = found.permutation
        t_in = None if order is None else Permutation(order)
        return Solution((part,), t_in=t_in, notes=found.notes)
