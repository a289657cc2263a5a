"""Simple post-training quantization: a scheme, rounding to nearest, nothing solved.

What llm-compressor's `QuantizationModifier` does by itself. Weights need no data;
activations with a static range need a calibrator and batches.
"""

from dataclasses import dataclass
from typing import Any

from jaxtyping import Array, Float

from qjax.core.coded import Coded, encode
from qjax.core.formats import Format
from qjax.core.qtensor import Activation
from qjax.core.ranges import MINMAX_RANGE, check_calibrator
from qjax.core.sweep import side_by_side
from qjax.methods.base import check_patterns
from qjax.schemes import scheme


@dataclass(frozen=True)
class SimplePTQ:
    """Round weights and activations to a scheme.

    Args:
      scheme: a named pair of formats; "W8A8" by default. Those with a static activation
        range, "FP8" and "NVFP4", are calibrated.
      calibrator: how a static range is found; `MinMaxRange()`, as in llm-compressor.
        Unused where nothing is static.
      targets: patterns of the sites to take; None takes all but the head, routers and
        embeddings.
      ignore: patterns of the sites to leave.

    Raises:
        ValueError: an unknown scheme, or a calibrator that does not serve it.
        TypeError: `calibrator` is none.
    """

    scheme: str = "W8A8"
    calibrator: Any = MINMAX_RANGE
    targets: str | tuple[str, ...] | None = None
    ignore: str | tuple[str, ...] = ()

    def __post_init__(self):
        check_patterns("SimplePTQ", self.targets, self.ignore)
        check_calibrator("SimplePTQ", self.calibrator, self.activation)

    @property
    def format(self) -> Format:
        """How the weights are stored."""
        return scheme(self.scheme).weights

    @property
    def activation(self) -> Activation | None:
        """How the input of the contraction is coded."""
        return scheme(self.scheme).activations

    @property
    def random(self) -> bool:
        """Rounding to nearest draws no random numbers."""
        return False

    @property
    def shared(self) -> bool:
        """Whether columns are independent, but for a second scale."""
        return side_by_side(self.format)

    def solve(self, w: Float[Array, "... K N"], key: Any = None) -> tuple[Coded, ...]:
        """The coded weights, in one part."""
        return (encode(w, self.format),)
