"""LQER: low-rank quantization error reconstruction (Zhang et al., ICML 2024).

https://arxiv.org/abs/2402.02446. The error of a quantized weight is factored with each
input feature weighed by its mean magnitude (the paper's L2QER),

    s = mean|x| / sqrt(min(mean|x|) max(mean|x|)),
    U S V = SVD_r(diag(s) (W - Q)),   L = diag(s)^-1 U sqrt(S),   R = sqrt(S) V.

Written from the paper. It codes the input of both branches, in 8 bits; here the
factors take the input itself. Its factors have 8 bits: `factors=Int(8)`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32

from qjax.core.lowrank import Factors, best_for_features
from qjax.core.statistics import MeanAbs, Statistic
from qjax.methods.reconstruction import ForInputs


def feature_sizes(mean_abs: Float32[Array, " K"]) -> Float32[Array, " K"]:
    """`s[K]`, of magnitudes of at least 1e-4."""
    size = jnp.maximum(mean_abs, np.float32(1e-4))
    return size / jnp.sqrt(jnp.min(size) * jnp.max(size))


@dataclass(frozen=True)
class LQER(ForInputs):
    """Factors of the error by size of the inputs: a repair, or rounding with one.

    Args:
      scheme: a named pair of formats; with it the weights are rounded to nearest first.
      weights: a weight format, in place of a scheme.
      activations: how the input of the coded weight is coded, beside `weights`; the
        factors take the input itself.
      calibrator: how a static activation range is found.
      rank: of the factors; 32, as in the paper. Of a start of adapters, theirs.
      factors: how they are coded, such as `Int(8)`; None keeps the weight's own type.
      targets: patterns of the sites; None takes all that are quantized.
      ignore: patterns of the sites to leave.

    Raises:
        ValueError: an unknown scheme, or a field out of range.
    """

    @property
    def statistics(self) -> Mapping[str, Statistic]:
        """`E|x|`."""
        return {"size": MeanAbs()}

    def factored(
        self, e: Float32[Array, "K N"], rank: int, stats: Mapping[str, Any]
    ) -> Factors:
        """The factors of the weighed error."""
        return best_for_features(e, feature_sizes(stats["size"]), rank)
