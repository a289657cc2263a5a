"""QEP: quantization error propagation (Arai and Ichikawa, 2025).

https://arxiv.org/abs/2504.09629. Before a layer is quantized, its weights are corrected
for the error that its input has gathered in the layers before it. Of all weights,

    W* = W + (H + lambda I)^-1 C^T W,   H = E[x x^T],   C = E[(x~ - x) x^T],

come nearest, through the quantized input `x`, to the output `x~^T W` of the
full-precision model; `strength` says how far to go there. Any method may then quantize
`W + strength (W* - W)`. Where the Hessian or the drift is not finite nothing is
corrected, and the note `corrected` says so.

The reference leaves `down_proj` uncorrected; here patterns say what is corrected.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from qjax.core.hessian import factorize, solve
from qjax.core.qtensor import Activation
from qjax.core.statistics import Cross, Hessian, Statistic
from qjax.methods.base import Calibrated, Solution, within
from qjax.methods.shared import Around


def corrected(
    w: Float[Array, "K N"],
    hessian: Float32[Array, "K K"],
    cross: Float32[Array, "K K"],
    strength: float,
    damping: float,
) -> tuple[Float[Array, "K N"], dict[str, Any]]:
    """`W + strength (H + lambda I)^-1 C^T W` in the dtype of `w`, and the notes."""
    exact = w.astype(jnp.float32)
    factor = factorize(hessian, damping)
    drift = jnp.matmul(cross.T * factor.unit, exact, precision="highest")
    usable = jnp.isfinite(cross).all() & ~factor.diagonal
    step = jnp.where(usable, solve(factor.upper, drift), np.float32(0))
    notes = {"corrected": usable, "correction_damping": factor.fraction}
    return (exact + np.float32(strength) * step).astype(w.dtype), notes


@dataclass(frozen=True)
class QEP(Around):
    """A correction of the weights for the drift of their input, before any method.

    Patterns, formats and the rest are those of `then`.

    Args:
      then: what quantizes the corrected weights, such as `GPTQ()` or `RTN()`.
      strength: how much of the correction to make, in (0, 1]; 0.5, as in the paper.
      damping: `lambda` as a share of the mean diagonal of the Hessian; 1, as in the
        reference.

    Raises:
        ValueError: a field out of range, or `then` itself corrects for the drift.
        TypeError: `then` quantizes no weights.
    """

    strength: float | int = 0.5
    damping: float | int = 1.0

    def __post_init__(self):
        super().__post_init__()
        within("QEP", "strength", self.strength, 0, 1)
        within("QEP", "damping", self.damping, 0, 1000)
        if isinstance(self.then, Calibrated) and self.then.full_precision:
            raise ValueError(
                f"QEP.then is {self.then!r}, which makes up for the drift of its input "
                "itself; take one that does not, such as GPTQ()"
            )

    @property
    def calibrator(self) -> Any:
        """How static activation ranges are found."""
        return getattr(self.then, "calibrator", None)

    @property
    def activation(self) -> Activation | None:
        """How the input of the contraction is coded."""
        return self.then.activation

    @property
    def statistics(self) -> dict[str, Statistic]:
        """The Hessian, how far the input has drifted, and what `then` needs."""
        return {**self.needed, "hessian": Hessian(), "cross": Cross()}

    @property
    def full_precision(self) -> bool:
        """The full-precision input is what the drift is measured against."""
        return True

    @property
    def shared(self) -> bool:
        """Whether columns are independent, but for a second scale."""
        return getattr(self.then, "shared", False)

    def solve_site(
        self, w: Float[Array, "K N"], stats: Mapping[str, Any], key: Any = None
    ) -> Solution:
        """What `then` makes of the corrected weights."""
        hessian, cross = stats["hessian"], stats["cross"]
        strength, damping = float(self.strength), float(self.damping)
        w, notes = corrected(w, hessian, cross, strength, damping)
        found = self.solve_then(w, stats, key)
        return replace(found, notes={**found.notes, **notes})
