"""QERA and LQER: the quantization error reconstructed for the inputs that occur.

QERA (Zhang et al., ICLR 2025), https://arxiv.org/abs/2410.06040: with `C = E[x x^T]`,
the factors that minimise `E||x (W - Q - L R)||^2` are

    U S V = SVD_r(C^(1/2) (W - Q)),   L = C^(-1/2) U,   R = S V    (theorem 1, exact)

and under the assumption that features are uncorrelated the same with the diagonal of
`C` (theorem 2, approximate). LQER (Zhang et al., ICML 2024),
https://arxiv.org/abs/2402.02446, has the diagonal `mean|x|`, divided by the root of the
product of its smallest and largest value.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32

from qjax.core.coded import Coded, encode
from qjax.core.formats import Codebook, Format
from qjax.core.statistics import Hessian, MeanAbs, SecondMoment, Statistic
from qjax.train.initialise import best_rank

_NF4 = Codebook("nf4")


def weighted(
    e: Float32[Array, "K N"], root: Float32[Array, " K"], rank: int
) -> tuple[Any, Any]:
    """Factors of `e` with the error of each input feature weighed by `root`."""
    floor = jnp.max(root) * np.float32(1e-4)
    root = jnp.maximum(root, jnp.where(floor > 0, floor, 1))[:, None]
    left, right = best_rank(root * e, rank)
    return left / root, right


@dataclass(frozen=True)
class QERA:
    """Factors of the error that the output sees.

    Args:
      weights: how the frozen part is stored.
      exact: weigh by the whole `E[x x^T]`; else by its diagonal.
    """

    weights: Format = _NF4
    exact: bool = True

    @property
    def statistic(self) -> Statistic:
        """`E[x x^T]`, or its diagonal."""
        return Hessian() if self.exact else SecondMoment()

    def split(
        self, w: Float32[Array, "K N"], rank: int, known: Any
    ) -> tuple[Coded, Any, Any]:
        """Codes of `w`, and the factors of theorem 1 or 2."""
        coded = encode(w, self.weights)
        e = w - coded.decode()
        if not self.exact:
            return coded, *weighted(e, jnp.sqrt(known), rank)
        values, vectors = jnp.linalg.eigh(known)
        # Directions that no input takes are given a little: C is inverted.
        floor = jnp.max(values) * np.float32(1e-6)
        roots = jnp.sqrt(jnp.maximum(values, jnp.where(floor > 0, floor, 1)))
        left, right = best_rank((vectors * roots) @ (vectors.T @ e), rank)
        return coded, (vectors / roots) @ (vectors.T @ left), right


@dataclass(frozen=True)
class LQER:
    """Factors of the error, each input feature weighed by its mean magnitude.

    Args:
      weights: how the frozen part is stored.
    """

    weights: Format = _NF4

    @property
    def statistic(self) -> Statistic:
        """`E|x|`."""
        return MeanAbs()

    def split(
        self, w: Float32[Array, "K N"], rank: int, known: Any
    ) -> tuple[Coded, Any, Any]:
        """Codes of `w`, and the factors of the weighed error."""
        coded = encode(w, self.weights)
        size = jnp.maximum(known, np.float32(1e-4))
        size = size / jnp.sqrt(jnp.min(size) * jnp.max(size))
        return coded, *weighted(w - coded.decode(), size, rank)
