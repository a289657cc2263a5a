"""RTN: round to nearest, the baseline of every other method.

Each weight goes to the nearest code of its group's grid. The grid's range is all that
can be chosen (`search`): the smallest and largest weight, a percentile, or the range of
least error.
"""

from dataclasses import dataclass
from typing import Any

from jaxtyping import Array, Float

from qjax.core.coded import Coded, encode
from qjax.core.scales import MINMAX, MSE, AbsMax, MinMax, Percentile, Search
from qjax.core.sweep import side_by_side
from qjax.methods.shared import Formatted


@dataclass(frozen=True)
class RTN(Formatted):
    """Round to nearest.

    Args:
      scheme: a named pair of formats, such as "W4A16" (the default) or "FP8_DYNAMIC".
      weights: a weight format, in place of a scheme.
      activations: how the input of the contraction is coded, beside `weights`.
      search: how the range of each group is chosen; `MinMax()` covers every weight.
      rounding: "nearest" (halves to even) or "stochastic" (needs a key).
      calibrator: how a static activation range is found, from calibration batches; None
        is `MinMaxRange()`.
      targets: patterns of the sites to take; None takes all but the head, routers and
        embeddings.
      ignore: patterns of the sites to leave.

    Raises:
        ValueError: an unknown name, `scheme` beside a format, or a calibrator where
            there is nothing to calibrate.
        TypeError: `calibrator` is none.
    """

    search: Search = MINMAX
    rounding: str = "nearest"

    def __post_init__(self):
        super().__post_init__()
        if self.rounding not in ("nearest", "stochastic"):
            raise ValueError(
                f'RTN.rounding must be "nearest" or "stochastic", got {self.rounding!r}'
            )
        if not isinstance(self.search, (MinMax, AbsMax, Percentile, MSE)):
            raise ValueError(
                "RTN.search must be MinMax, AbsMax, Percentile or MSE, "
                f"got {self.search!r}"
            )

    @property
    def random(self) -> bool:
        """Whether a key is needed."""
        return self.rounding == "stochastic"

    @property
    def shared(self) -> bool:
        """Whether columns are independent, but for a second scale."""
        return side_by_side(self.format)

    def solve(self, w: Float[Array, "... K N"], key: Any = None) -> tuple[Coded, ...]:
        """The coded weights, in one part."""
        coded = encode(
            w, self.format, search=self.search, rounding=self.rounding, key=key
        )
        return (coded,)
