"""RTN: round to nearest, the baseline of every other method.

Each weight goes to the nearest code of its group's grid. The grid's range is all that
can be chosen (`search`): the smallest and largest weight, a percentile, or the range of
least error.
"""

from dataclasses import dataclass
from typing import Any

from jaxtyping import Array, Float

from qjax.core.coded import Coded, encode
from qjax.core.formats import Format
from qjax.core.qtensor import Activation
from qjax.core.ranges import MINMAX_RANGE, check_calibrator
from qjax.core.scales import MINMAX, MSE, AbsMax, MinMax, Percentile, Search
from qjax.methods.base import check_patterns
from qjax.schemes import Scheme, scheme


@dataclass(frozen=True)
class RTN:
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

    scheme: str | None = None
    weights: Format | None = None
    activations: Activation | None = None
    search: Search = MINMAX
    rounding: str = "nearest"
    calibrator: Any = None
    targets: str | tuple[str, ...] | None = None
    ignore: str | tuple[str, ...] = ()

    def __post_init__(self):
        check_patterns("RTN", self.targets, self.ignore)
        if self.rounding not in ("nearest", "stochastic"):
            raise ValueError(
                f'RTN.rounding must be "nearest" or "stochastic", got {self.rounding!r}'
            )
        if not isinstance(self.search, (MinMax, AbsMax, Percentile, MSE)):
            raise ValueError(
                "RTN.search must be MinMax, AbsMax, Percentile or MSE, "
                f"got {self.search!r}"
            )
        self._check_formats()

    def _check_formats(self):
        given = [f for f in ("weights", "activations") if getattr(self, f) is not None]
        if self.scheme is not None and given:
            raise ValueError(
                f"RTN.scheme {self.scheme!r} already says the formats; leave out "
                f"{' and '.join(given)}"
            )
        if given == ["activations"]:
            raise ValueError("RTN.activations needs RTN.weights beside it")
        self._check_calibrator()

    def _check_calibrator(self):
        static = self.activation is not None and not self.activation.dynamic
        if self.calibrator is not None and not static:
            raise ValueError(
                f"RTN.calibrator {self.calibrator!r} has nothing to calibrate: no "
                "activation range is static; leave it out, or take a static one such "
                'as scheme="FP8"'
            )
        check_calibrator("RTN", self.calibrator or MINMAX_RANGE, self.activation)

    @property
    def formats(self) -> Scheme:
        """The pair of formats."""
        if self.weights is not None:
            return Scheme(self.weights, self.activations)
        return scheme(self.scheme or "W4A16")

    @property
    def format(self) -> Format:
        """How the weights are stored."""
        return self.formats.weights

    @property
    def activation(self) -> Activation | None:
        """How the input of the contraction is coded."""
        return self.formats.activations

    @property
    def random(self) -> bool:
        """Whether a key is needed."""
        return self.rounding == "stochastic"

    def solve(self, w: Float[Array, "... K N"], key: Any = None) -> tuple[Coded, ...]:
        """The coded weights, in one part."""
        coded = encode(
            w, self.format, search=self.search, rounding=self.rounding, key=key
        )
        return (coded,)
