"""ZeroQuant (Yao et al., 2022, arXiv:2206.01861): W8A8 and W4A8 without training.

Group-wise weights: the outputs of a linear are cut into groups and each group `w[:, g]`
has one scale over all of its inputs (section 4.1; the reference implementation reshapes
`[out, in]` to `[groups, -1]`). Token-wise activations: each token is coded with the
range that it has at run time.

Differences from the reference implementation: it counts groups, here their size is
given, so that one setting fits linears of any width (`outputs = N / groups`); a group
of fewer than one output is a group of `inputs` of one output; the symmetric scale is
`absmax / ((2^b - 1) / 2)`, as in compressed-tensors, where DeepSpeed divides by
`2^(b-1)`. The distillation of layers is a method of its own; the search of bits and
groups for every layer is `qjax.zeroquant_search`.
"""

from dataclasses import dataclass
from typing import Any

from jaxtyping import Array, Float

from qjax.core.coded import Coded, encode
from qjax.core.formats import Int, block, token
from qjax.core.qtensor import Activation
from qjax.core.scales import MINMAX, MSE, AbsMax, MinMax, Percentile, Search
from qjax.methods.base import check_patterns, positive_integer


@dataclass(frozen=True)
class ZeroQuant:
    """Group-wise weights and token-wise activations, rounded to nearest.

    Args:
      bits: of the weights; 8 (W8A8), 4 for W4A8.
      outputs: output features that share a scale; 16, as 48 groups of 768 outputs. None
        takes all of them.
      inputs: input features that share a scale; None, as in the paper, takes all.
      symmetric: whether the weights' grids have no zero point.
      activation_bits: of each token, symmetric; 8. None leaves activations in float.
      search: how the range of each group is chosen; `MinMax()` covers every weight.
      targets: patterns of the sites to take; None takes all but the head, routers and
        embeddings.
      ignore: patterns of the sites to leave.

    Raises:
        ValueError: a field is out of its range.
    """

    bits: int = 8
    outputs: int | None = 16
    inputs: int | None = None
    symmetric: bool = True
    activation_bits: int | None = 8
    search: Search = MINMAX
    targets: str | tuple[str, ...] | None = None
    ignore: str | tuple[str, ...] = ()

    def __post_init__(self):
        check_patterns("ZeroQuant", self.targets, self.ignore)
        for name in ("bits", "activation_bits"):
            bits = getattr(self, name)
            if bits is not None or name == "bits":
                positive_integer("ZeroQuant", name, bits)
                if int(bits or 0) not in range(2, 9):
                    raise ValueError(
                        f"ZeroQuant.{name} must be a whole number from 2 to 8, "
                        f"got {bits!r}"
                    )
        for name in ("outputs", "inputs"):
            if getattr(self, name) is not None:
                positive_integer("ZeroQuant", name, getattr(self, name))
        if not isinstance(self.search, (MinMax, AbsMax, Percentile, MSE)):
            raise ValueError(
                "ZeroQuant.search must be MinMax, AbsMax, Percentile or MSE, "
                f"got {self.search!r}"
            )

    @property
    def format(self) -> Int:
        """How the weights are stored."""
        return Int(
            self.bits, block(self.inputs, self.outputs), symmetric=self.symmetric
        )

    @property
    def activation(self) -> Activation | None:
        """How the input of the contraction is coded."""
        if self.activation_bits is None:
            return None
        return Activation(Int(self.activation_bits, token()))

    @property
    def random(self) -> bool:
        """Rounding to nearest draws no random numbers."""
        return False

    def solve(self, w: Float[Array, "... K N"], key: Any = None) -> tuple[Coded, ...]:
        """The coded weights, in one part."""
        return (encode(w, self.format, search=self.search),)


def zeroquant_mixed(
    feed_forward: str | tuple[str, ...] = "*mlp*", outputs: int | None = 16
) -> tuple[ZeroQuant, ZeroQuant]:
    """The paper's W4/8A8: int4 in the feed-forward linears, int8 in all others.

    Args:
      feed_forward: patterns of the feed-forward linears.
      outputs: as in `ZeroQuant`.
    """
    small = ZeroQuant(4, outputs, targets=feed_forward)
    return small, ZeroQuant(8, outputs)
