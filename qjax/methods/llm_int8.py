"""LLM.int8(): 8-bit matrix multiplication with outlier features in float.

Dettmers, Lewis, Belkada, Zettlemoyer, 2022, https://arxiv.org/abs/2208.07339.

Weights have one scale for each output feature, activations one for each token (both
`absmax / 127`, equation 7), and features with a magnitude of at least `threshold`
anywhere in the batch are contracted in float with the decoded weights (equation 8).

Codes and scales of activations are those of the reference implementation (package
`bitsandbytes`): found on values brought to float16, with scales in float32. Only values
that reach the threshold are left out of a token's scale, while the small values of an
outlier feature may widen it; the float part has the dtype of the activation. Without a
threshold, values beyond float16 give NaN, as there. Differences: shapes are static, so
that the float part is as wide as the input (what is saved is memory and error, not
time), and `1/127^2` is exact, where bitsandbytes 0.50 has 6.200124e-5 on a CPU, which
is 1.8e-5 too large.
"""

from dataclasses import dataclass
from typing import Any

from jaxtyping import Array, Float

from qjax.core.coded import Coded, encode
from qjax.core.formats import Int, channel, token
from qjax.core.qtensor import Activation
from qjax.methods.base import check_patterns


@dataclass(frozen=True)
class LLMInt8:
    """8-bit weights and activations, outlier features in float.

    Dot sites only: a convolution or an expert that it takes is refused when it runs.

    Args:
      threshold: magnitude from which a feature is an outlier; 6.0, as in the paper. 0
        keeps none, as in the reference: vector-wise W8A8.
      targets: patterns of the sites to take; None takes all but the head, routers and
        embeddings.
      ignore: patterns of the sites to leave.

    Raises:
        ValueError: `threshold` is negative or no number.
    """

    threshold: float | int = 6.0
    targets: str | tuple[str, ...] | None = None
    ignore: str | tuple[str, ...] = ()

    def __post_init__(self):
        number = isinstance(self.threshold, (int, float))
        if not number or isinstance(self.threshold, bool) or not self.threshold >= 0:
            raise ValueError(
                f"LLMInt8.threshold must be a number >= 0, got {self.threshold!r}"
            )
        check_patterns("LLMInt8", self.targets, self.ignore)

    @property
    def format(self) -> Int:
        """How the weights are stored."""
        return Int(8, channel(), scale_rule="float16")

    @property
    def activation(self) -> Activation:
        """How the input of the contraction is coded."""
        return Activation(
            Int(8, token(), scale_rule="float16"), outliers=self.threshold or None
        )

    @property
    def random(self) -> bool:
        """LLM.int8() draws no random numbers."""
        return False

    def solve(self, w: Float[Array, "... K N"], key: Any = None) -> tuple[Coded, ...]:
        """The coded weights, in one part."""
        return (encode(w, self.format),)
