"""What methods share that make up for a quantization error by low-rank factors.

Behind a method that quantizes they repair: `(GPTQ("W4A16"), QERA(rank=32))`. With a
scheme or a weight format of their own they round to nearest first: `QERA("W4A16")`.
`qjax.initialise_lora` starts adapters with them.
"""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from qjax.core.coded import Coded, encode
from qjax.core.formats import Codebook, Format
from qjax.core.lowrank import Factors, kept
from qjax.core.qtensor import factor
from qjax.core.statistics import Statistic
from qjax.methods.base import Solution, check_format, positive_integer
from qjax.methods.shared import Formatted

_NF4 = Codebook("nf4")


def with_factors(
    solution: Solution, left: Any, right: Any, format: Format | None, dtype: Any
) -> Solution:
    """The solution with `L R` beside what it has; both are found for `W` itself.

    Args:
      solution: what the factors stand beside.
      left, right: `L[..., K, r]`, in the order of the features, and `R[..., r, N]`.
      format: how they are coded; None keeps them in `dtype`.
      dtype: of the weight.
    """
    if solution.t_in is not None:
        left = solution.t_in.undone(left)
    if solution.left is not None:
        left = jnp.concatenate([factor(solution.left, left.dtype), left], -1)
        right = jnp.concatenate([factor(solution.right, right.dtype), right], -2)
    return replace(
        solution, left=kept(left, format, dtype), right=kept(right, format, dtype)
    )


@dataclass(frozen=True)
class Reconstruction(Formatted):
    """Factors of the error that a quantized weight leaves.

    `usual_rank` is taken where no rank is given.

    Raises:
        ValueError: an unknown scheme, or a field out of range.
    """

    _: KW_ONLY
    rank: int | None = None
    factors: Format | None = None

    usual_rank = 32

    def __post_init__(self):
        super().__post_init__()
        if self.rank is not None:
            positive_integer(type(self).__name__, "rank", self.rank)
        check_format(type(self).__name__, "factors", self.factors)

    @property
    def quantizes(self) -> bool:
        """Whether it has formats of its own; else it repairs."""
        return self.scheme is not None or self.weights is not None

    @property
    def statistics(self) -> Mapping[str, Statistic]:
        """What to accumulate over the site's input."""
        return {}

    @abstractmethod
    def factored(
        self, e: Float32[Array, "... K N"], rank: int, stats: Mapping[str, Any]
    ) -> Factors:
        """The factors of an error `e`."""

    def repair(
        self, w: Float[Array, "... K N"], solution: Solution, stats: Mapping[str, Any]
    ) -> Solution:
        """The solution with factors of what it lacks."""
        e = w.astype(jnp.float32) - solution.decoded()
        left, right = self.factored(e, self.rank or self.usual_rank, stats)
        return with_factors(solution, left, right, self.factors, w.dtype)

    def nearest(self, w: Float[Array, "... K N"], stats: Mapping[str, Any]) -> Solution:
        """The weight rounded to nearest, and repaired."""
        return self.repair(w, Solution((encode(w, self.format),)), stats)

    @property
    def statistic(self) -> Statistic | None:
        """What a start of adapters must know of the site's input."""
        return next(iter(self.statistics.values()), None)

    def split(
        self, w: Float32[Array, "K N"], rank: int, known: Any
    ) -> tuple[Coded, Any, Any]:
        """A start of adapters: codes of `w`, and factors of the rest in float.

        Raises:
            ValueError: a rank that is not the adapters', or coded factors.
        """
        check_start(self, rank)
        coded = encode(w, self.format if self.quantizes else _NF4)
        stats = dict.fromkeys(self.statistics, known)
        return coded, *self.factored(w - coded.decode(), rank, stats)


def check_start(method: Any, rank: int) -> None:
    """Refuse a start of adapters that is not as they are.

    Raises:
        ValueError: a rank that is not the adapters', or coded factors.
    """
    own = type(method).__name__
    if method.rank not in (None, rank):
        raise ValueError(
            f"{own}.rank is {method.rank}, but the adapters have rank {rank}; leave it "
            "out"
        )
    if method.factors is not None:
        raise ValueError(
            f"{own}.factors is {method.factors.name}, but adapters are trained in "
            "float; leave it out"
        )


@dataclass(frozen=True)
class ForInputs(Reconstruction):
    """One whose factors are found for the inputs that occur."""

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
        """The weight rounded to nearest, and the factors of its error."""
        return self.nearest(w, stats)
