"""IMatrix: round to nearest on grids chosen for the features that matter.

The importance matrix of llama.cpp, as compressed-tensors' `imatrix_mse` observer uses
it: each group's range shrinks by the factor that leaves the least error

    sum_k E[x_k^2] |w_k - q_k|^norm,

so that features with large inputs are kept exact at the cost of the others. Only a
diagonal of the Hessian is needed, and no order, no compensation: nearly as cheap as
RTN. The peer stops at the first five candidates without progress; here all are tried.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from qjax.core.coded import encode
from qjax.core.formats import Binary, Ternary
from qjax.core.scales import MSE
from qjax.core.statistics import SecondMoment, Statistic
from qjax.methods.base import Solution
from qjax.methods.shared import FromStatistics

_SEARCH = MSE(norm=3.0, grid=20, maxshrink=0.95)


@dataclass(frozen=True)
class IMatrix(FromStatistics):
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

    search: MSE = field(default=_SEARCH, kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.search, MSE):
            raise ValueError(
                f"IMatrix.search must be MSE, which measures an error, "
                f"got {self.search!r}"
            )
        if isinstance(self.format, (Binary, Ternary)):
            raise ValueError(
                f"IMatrix cannot search {self.format.name}: its scale is the mean "
                "magnitude; take a format with a range, such as Int(4, group(128))"
            )

    @property
    def statistics(self) -> dict[str, Statistic]:
        """The mean square of each input feature."""
        return {"second_moment": SecondMoment()}

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
