"""QERA: the quantization error reconstructed for the outputs (Zhang et al., ICLR 2025).

https://arxiv.org/abs/2410.06040. With `C = E[x x^T]`, the factors that minimise
`E|x (W - Q - L R)|^2` are

    U S V = SVD_r(C^(1/2) (W - Q)),   L = C^(-1/2) U,   R = S V    (theorem 1, exact)

and under the assumption that features are uncorrelated the same with the diagonal of
`C` (theorem 2, approximate).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float32

from qjax.core.lowrank import Factors, best_for_features, best_for_outputs
from qjax.core.statistics import Hessian, SecondMoment, Statistic
from qjax.methods.reconstruction import ForInputs


@dataclass(frozen=True)
class QERA(ForInputs):
    """Factors of the error that the output sees: a repair, or rounding with one.

    Args:
      scheme: a named pair of formats; with it the weights are rounded to nearest first.
      weights: a weight format, in place of a scheme.
      activations: how the input of the coded weight is coded, beside `weights`; the
        factors take the input itself.
      calibrator: how a static activation range is found.
      rank: of the factors; 32, as in the paper. Of a start of adapters, theirs.
      factors: how they are coded, such as `Int(8)`; None keeps the weight's own type.
      exact: weigh by the whole `E[x x^T]` (theorem 1); else by its diagonal.
      targets: patterns of the sites; None takes all that are quantized.
      ignore: patterns of the sites to leave.

    Raises:
        ValueError: an unknown scheme, or a field out of range.
    """

    exact: bool = True

    @property
    def statistics(self) -> Mapping[str, Statistic]:
        """`E[x x^T]`, or its diagonal."""
        return {"moments": Hessian() if self.exact else SecondMoment()}

    def factored(
        self, e: Float32[Array, "K N"], rank: int, stats: Mapping[str, Any]
    ) -> Factors:
        """The factors of theorem 1 or 2."""
        moments = stats["moments"]
        if self.exact:
            return best_for_outputs(e, moments, rank)
        return best_for_features(e, jnp.sqrt(moments), rank)
