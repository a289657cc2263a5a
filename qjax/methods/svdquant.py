"""SVDQuant: outliers absorbed by a low-rank branch (Li et al., ICLR 2025).

https://arxiv.org/abs/2411.05007. Outliers of activations are moved into the weights,
`x' = x diag(s)^-1`, `W' = diag(s) W`; the largest singular values of `W'` are kept in
16 bits and take them in; what they leave is quantized, and so is the input that it
meets, but not that of the factors:

    x W = x' L R + x' (W' - L R)  ~  x' L R + q(x') q(W' - L R),   L R = SVD_r(W').

This is the split. The smoothing before it is `SmoothQuant`, folded into norms or, with
`online=True`, for all sites as in the paper; any method may quantize the residual:

    (SmoothQuant(online=True), SVDQuant(then=GPTQ("W4A4")))

Differences: the paper searches the strength of smoothing for each site, and refines
factors and residual in turns as long as the output's error falls.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from qjax.core.formats import Format
from qjax.core.lowrank import best_rank
from qjax.core.qtensor import Activation
from qjax.core.statistics import Statistic
from qjax.methods.base import Calibrated, Solution, check_format, positive_integer
from qjax.methods.reconstruction import with_factors
from qjax.methods.shared import Around


@dataclass(frozen=True)
class SVDQuant(Around):
    """A low-rank branch in float, and a method that quantizes what it leaves.

    Patterns and formats are those of `then`.

    Args:
      then: what quantizes the residual, such as `RTN("W4A4")` or `GPTQ("W4A4")`.
      rank: of the branch; 32, as in the paper.
      factors: how the branch is coded; None keeps the weight's own type.

    Raises:
        ValueError: a field out of range, or `then` compares with the full-precision
            stream, which knows nothing of the branch.
        TypeError: `then` quantizes no weights.
    """

    rank: int = 32
    factors: Format | None = None

    def __post_init__(self):
        super().__post_init__()
        positive_integer("SVDQuant", "rank", self.rank)
        check_format("SVDQuant", "factors", self.factors)
        if isinstance(self.then, Calibrated) and self.then.full_precision:
            raise ValueError(
                f"SVDQuant.then is {self.then!r}, which makes up for the drift of the "
                "input of the whole weight, not of a residual; take GPTQ() or RTN()"
            )

    @property
    def calibrator(self) -> Any:
        """How static activation ranges are found."""
        return getattr(self.then, "calibrator", None)

    @property
    def activation(self) -> Activation | None:
        """How the input of the residual is coded."""
        return self.then.activation

    @property
    def statistics(self) -> Mapping[str, Statistic]:
        """What `then` needs."""
        return self.needed

    @property
    def full_precision(self) -> bool:
        """Whether a full-precision stream runs beside the quantized one."""
        return False

    @property
    def shared(self) -> bool:
        """Columns are not independent: they share the factors."""
        return False

    def solve_site(
        self, w: Float[Array, "K N"], stats: Mapping[str, Any], key: Any = None
    ) -> Solution:
        """The branch, and what `then` makes of the rest."""
        exact = w.astype(jnp.float32)
        left, right = best_rank(exact, self.rank)
        # The rest of the factors as they are stored: what is kept adds up to W.
        branch = with_factors(Solution(()), left, right, self.factors, w.dtype)
        rest = (exact - branch.decoded()).astype(w.dtype)
        found = self.solve_then(rest, stats, key)
        return with_factors(found, left, right, self.factors, w.dtype)
