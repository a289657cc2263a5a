"""IMatrix: round to nearest on grids chosen for the features that matter.

The importance matrix of llama.cpp, as compressed-tensors' `imatrix_mse` observer uses
it: each group's range shrinks by the factor that leaves the least error

    sum_k E[x_k^2] |w_k - q_k|^norm,

so that features with large inputs are kept exact at the cost of the others. Only a
diagonal of the Hessian is needed, and no order, no compensation: nearly as cheap as
RTN. The peer stops at the first five candidates without progress; here all are tried.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from qjax.core.coded import encode
from qjax.core.formats import Binary, Format, Ternary
from qjax.core.qtensor import Activation
from qjax.core.ranges import MINMAX_RANGE, check_calibrator
from qjax.core.scales import MSE
from qjax.core.statistics import SecondMoment, Statistic
from qjax.core.sweep import columns_alone
from qjax.methods.base import Solution, check_patterns
from qjax.schemes import Scheme, scheme

_SEARCH = MSE(norm=3.0, grid=20, maxshrink=0.95)


@dataclass(frozen=True)
class IMatrix:
    """Round to nearest, the search of scales weighted by `E[x^2]`.

    Args:
      scheme: a named pair of formats; "W4A16" is the default.
      weights: a weight format, in place of a scheme.
      activations: how the input of the contraction is coded, beside `weights`.
      calibrator: how a static activation range is found; None is `MinMaxRange()`.
      search: the candidates and the exponent of the error; the defaults of
        compressed-tensors' `imatrix_mse`: norm 3, grid 20, maxshrink 0.95.
      targets: patterns of the sites to take; None takes all but the head, routers and
        embeddings.
      ignore: patterns of the sites to leave.

    Raises:
        ValueError: an unknown name, `scheme` beside a format, or a format without a
            range to search.
        TypeError: `calibrator` is none.
    """

    scheme: str | None = None
    weights: Format | None = None
    activations: Activation | None = None
    calibrator: Any = None
    search: MSE = _SEARCH
    targets: str | tuple[str, ...] | None = None
    ignore: str | tuple[str, ...] = ()

    def __post_init__(self):
        check_patterns("IMatrix", self.targets, self.ignore)
        if not isinstance(self.search, MSE):
            raise ValueError(
                f"IMatrix.search must be MSE, which measures an error, "
                f"got {self.search!r}"
            )
        self._check_formats()
        if isinstance(self.format, (Binary, Ternary)):
            raise ValueError(
                f"IMatrix cannot search {self.format.name}: its scale is the mean "
                "magnitude; take a format with a range, such as Int(4, group(128))"
            )

    def _check_formats(self):
        given = [f for f in ("weights", "activations") if getattr(self, f) is not None]
        if self.scheme is not None and given:
            raise ValueError(
                f"IMatrix.scheme {self.scheme!r} already says the formats; leave out "
                f"{' and '.join(given)}"
            )
        if given == ["activations"]:
            raise ValueError("IMatrix.activations needs IMatrix.weights beside it")
        static = self.activation is not None and not self.activation.dynamic
        if self.calibrator is not None and not static:
            raise ValueError(
                f"IMatrix.calibrator {self.calibrator!r} has nothing to calibrate: no "
                "activation range is static; leave it out"
            )
        check_calibrator("IMatrix", self.calibrator or MINMAX_RANGE, self.activation)

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
        """IMatrix draws no random numbers."""
        return False

    @property
    def statistics(self) -> dict[str, Statistic]:
        """The mean square of each input feature."""
        return {"second_moment": SecondMoment()}

    @property
    def full_precision(self) -> bool:
        """The quantized stream is enough."""
        return False

    @property
    def shared(self) -> bool:
        """Whether columns are independent."""
        return columns_alone(self.format)

    def solve_site(
        self, w: Float[Array, "K N"], stats: Mapping[str, Any], key: Any = None
    ) -> Solution:
        """The coded weights, in one part.

        A feature whose statistic is not finite leaves its groups the whole range.
        """
        moment = stats["second_moment"]
        # In units of the largest, so that sums of errors stay in float32.
        top = jnp.max(moment)
        importance = moment / jnp.where(top == 0, np.float32(1), top)
        part = encode(w, self.format, search=self.search, importance=importance)
        return Solution((part,), notes={"dead": (moment == 0).sum()})
