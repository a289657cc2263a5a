"""LoftQ (Li et al., ICLR 2024).

https://arxiv.org/abs/2310.08659, algorithm 1

Alternates between coding what the factors leave, `Q = q(W - A B)`, and the best factors
of what the codes leave, `A, B = SVD_r(W - Q)`, from `A B = 0`.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float32

from qjax.core.coded import Coded, encode
from qjax.core.formats import Codebook, Format
from qjax.methods.base import positive_integer
from qjax.train.initialise import best_rank

_NF4 = Codebook("nf4")


@dataclass(frozen=True)
class LoftQ:
    """Codes and factors, found in turns.

    Args:
      weights: how the frozen part is stored; NF4 in groups of 64, as in the paper.
      iters: turns; 5, as in the paper.

    Raises:
      ValueError: `iters` is not a whole number above zero.
    """

    weights: Format = _NF4
    iters: int = 5

    def __post_init__(self):
        positive_integer("LoftQ", "iters", self.iters)

    @property
    def statistic(self) -> None:
        """It needs the weights alone."""

    def split(
        self, w: Float32[Array, "K N"], rank: int, known: Any
    ) -> tuple[Coded, Any, Any]:
        """Codes and factors with `Q + L R` near to `w`."""
        left, right = jnp.zeros((w.shape[0], rank)), jnp.zeros((rank, w.shape[1]))
        coded = encode(w, self.weights)
        for turn in range(self.iters):
            if turn:
                coded = encode(w - left @ right, self.weights)
            left, right = best_rank(w - coded.decode(), rank)
        return coded, left, right
