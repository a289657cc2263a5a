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

from qjax.core.coded import pack_codes
from qjax.core.formats import Format
from qjax.core.qtensor import Activation
from qjax.core.ranges import MINMAX_RANGE, check_calibrator
from qjax.core.scales import MINMAX, MSE, Search
from qjax.core.statistics import Hessian, Statistic
from qjax.core.sweep import ORDERS, Sweep, columns_alone, sweep
from qjax.core.transforms import Permutation
from qjax.methods.base import Solution, check_patterns, positive_integer, within
from qjax.schemes import Scheme, scheme


@dataclass(frozen=True)
class GPTQ:
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
        check_patterns("GPTQ", self.targets, self.ignore)
        within("GPTQ", "damping", self.damping, 0, 100)
        positive_integer("GPTQ", "block_size", self.block_size)
        if self.act_order not in (None, *ORDERS):
            raise ValueError(
                f"GPTQ.act_order must be None or one of {ORDERS}, "
                f"got {self.act_order!r}"
            )
        if self.importance and not isinstance(self.search, MSE):
            raise ValueError(
                "GPTQ.importance needs a search that measures an error, "
                f"GPTQ.search=MSE(), got {self.search!r}"
            )
        self._check_formats()

    def _check_formats(self):
        given = [f for f in ("weights", "activations") if getattr(self, f) is not None]
        if self.scheme is not None and given:
            raise ValueError(
                f"GPTQ.scheme {self.scheme!r} already says the formats; leave out "
                f"{' and '.join(given)}"
            )
        if given == ["activations"]:
            raise ValueError("GPTQ.activations needs GPTQ.weights beside it")
        static = self.activation is not None and not self.activation.dynamic
        if self.calibrator is not None and not static:
            raise ValueError(
                f"GPTQ.calibrator {self.calibrator!r} has nothing to calibrate: no "
                "activation range is static; leave it out"
            )
        check_calibrator("GPTQ", self.calibrator or MINMAX_RANGE, self.activation)

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
        """GPTQ draws no random numbers."""
        return False

    @property
    def statistics(self) -> dict[str, Statistic]:
        """The Hessian."""
        return {"hessian": Hessian()}

    @property
    def full_precision(self) -> bool:
        """The quantized stream is enough."""
        return False

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
        found = sweep(w, stats["hessian"], self.sweep)
        part = pack_codes(found.codes, found.grid, self.format, w.shape)
        order = found.permutation
        t_in = None if order is None else Permutation(order)
        return Solution((part,), t_in=t_in, notes=found.notes)
