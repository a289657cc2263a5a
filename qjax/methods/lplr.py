"""LPLR: low rank and low precision (Saha, Srivastava and Pilanci, NeurIPS 2023).

https://arxiv.org/abs/2310.11028. A weight is factored first, `W = L R`, and both
factors are coded; nothing else is kept. The second factor is fitted to the first one
as it is coded, so that it makes up for some of its error:

    Q_L = q(U sqrt(S)),   R = argmin |W - Q_L R|^2,   Q_R = q(R).

With `refit=False` both factors of the singular value decomposition are coded as they
are, the paper's baseline. Difference: the basis comes from a whole decomposition, not
from a random sketch of the columns.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from qjax.core.formats import Format, Int
from qjax.core.lowrank import best_rank, each, kept
from qjax.core.qtensor import Activation
from qjax.methods.base import Solution, check_format, check_patterns, within

_INT8 = Int(8)


def fitted(basis: Float[Array, "K r"], w: Float[Array, "K N"]) -> Any:
    """`R[r, N]` with `basis @ R` nearest to `w`."""
    q, r = jnp.linalg.qr(basis)
    inverse = jnp.linalg.pinv(r)
    return inverse @ (q.T @ w)


@dataclass(frozen=True)
class LPLR:
    """Both factors of a weight in low bits, and nothing beside them.

    Args:
      rank: of the factors: a whole number, or a share of the smaller side of a weight;
        0.5. Bits per weight are `rank (K + N) bits / (K N)`, and the scales.
      factors: how both are coded; `Int(8)`, one scale for each column.
      refit: whether the second factor is fitted to the coded first.
      targets: patterns of the sites to take; None takes all but the head, routers and
        embeddings.
      ignore: patterns of the sites to leave.

    Raises:
        ValueError: a rank or a format that is none.
    """

    rank: int | float = 0.5
    factors: Format = _INT8
    refit: bool = True
    targets: str | tuple[str, ...] | None = None
    ignore: str | tuple[str, ...] = ()

    def __post_init__(self):
        check_patterns("LPLR", self.targets, self.ignore)
        whole = isinstance(self.rank, int)
        within("LPLR", "rank", self.rank, 0, np.inf if whole else 1)
        check_format("LPLR", "factors", self.factors, required=True)

    @property
    def format(self) -> Format:
        """How the factors are stored."""
        return self.factors

    @property
    def activation(self) -> Activation | None:
        """The input stays in float."""
        return None

    @property
    def random(self) -> bool:
        """No random numbers are drawn."""
        return False

    def solve(self, w: Float[Array, "... K N"], key: Any = None) -> Solution:
        """The coded factors."""
        return each(self._solve, w)

    def _solve(self, w: Float[Array, "K N"]) -> Solution:
        exact, rank = w.astype(jnp.float32), self.rank
        if isinstance(rank, float):
            rank = max(int(rank * min(w.shape[-2:])), 1)
        left, right = best_rank(exact, rank)
        coded = kept(left, self.factors, w.dtype)
        if self.refit:
            right = fitted(coded.decode(), exact)
        return Solution((), left=coded, right=kept(right, self.factors, w.dtype))
