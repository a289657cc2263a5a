"""Fields, checks and properties that several methods have."""

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any

from jaxtyping import Array
from jaxtyping import Float as Floating

from qjax.core.coded import pack_codes
from qjax.core.formats import Additive, Format
from qjax.core.qtensor import Activation
from qjax.core.ranges import MINMAX_RANGE, check_calibrator
from qjax.core.scales import MINMAX, MSE, Search
from qjax.core.statistics import Statistic
from qjax.core.sweep import ORDERS, Sweep, side_by_side, sweep
from qjax.core.transforms import Permutation
from qjax.methods.base import (
    Calibrated,
    DataFree,
    Solution,
    check_patterns,
    positive_integer,
    solution_of,
    within,
)
from qjax.schemes import Scheme, scheme


@dataclass(frozen=True)
class Formatted:
    """A method that stores any pair of formats: a scheme, or a weight format.

    Raises:
        ValueError: an unknown scheme, a scheme beside a format, or a calibrator where
            there is nothing to calibrate.
        TypeError: `calibrator` is none, or a pattern is none.
    """

    scheme: str | None = None
    weights: Format | None = None
    activations: Activation | None = None
    _: KW_ONLY
    calibrator: Any = None
    targets: str | tuple[str, ...] | None = None
    ignore: str | tuple[str, ...] = ()

    def __post_init__(self):
        own = type(self).__name__
        check_patterns(own, self.targets, self.ignore)
        given = [f for f in ("weights", "activations") if getattr(self, f) is not None]
        if self.scheme is not None and given:
            raise ValueError(
                f"{own}.scheme {self.scheme!r} already says the formats; leave out "
                f"{' and '.join(given)}"
            )
        if given == ["activations"]:
            raise ValueError(f"{own}.activations needs {own}.weights beside it")
        static = self.activation is not None and not self.activation.dynamic
        if self.calibrator is not None and not static:
            raise ValueError(
                f"{own}.calibrator {self.calibrator!r} has nothing to calibrate: no "
                "activation range is static; leave it out, or take a static one such "
                'as scheme="FP8"'
            )
        check_calibrator(own, self.calibrator or MINMAX_RANGE, self.activation)

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
        """Whether a key is needed: no random numbers are drawn."""
        return False


@dataclass(frozen=True)
class FromStatistics(Formatted):
    """One that needs statistics of its input in the quantized model, and no others."""

    @property
    def full_precision(self) -> bool:
        """Whether a full-precision stream runs beside the quantized one."""
        return False

    @property
    def shared(self) -> bool:
        """Whether columns are independent, but for a second scale."""
        return side_by_side(self.format)


@dataclass(frozen=True)
class Sweeping(FromStatistics):
    """A method that rounds feature after feature and passes the errors on."""

    _: KW_ONLY
    search: Search = MINMAX
    damping: float | int = 0.01
    block_size: int = 128
    act_order: str | None = "static"
    importance: bool = False

    def __post_init__(self):
        own = type(self).__name__
        within(own, "damping", self.damping, 0, 100)
        positive_integer(own, "block_size", self.block_size)
        if self.act_order not in (None, *ORDERS):
            raise ValueError(
                f"{own}.act_order must be None or one of {ORDERS}, "
                f"got {self.act_order!r}"
            )
        if self.importance and not isinstance(self.search, MSE):
            raise ValueError(
                f"{own}.importance needs a search that measures an error, "
                f"{own}.search=MSE(), got {self.search!r}"
            )
        super().__post_init__()
        if isinstance(self.format, Additive):
            raise ValueError(
                f"{own} codes one input after the other, and a code of "
                f"{self.format.name} stands for {self.format.length}; take a format "
                "such as Int(4, group(128))"
            )

    @property
    def sweep(self) -> Sweep:
        """How a matrix is swept."""
        return Sweep(
            self.format,
            self.search,
            float(self.damping),
            self.block_size,
            self.act_order or "off",
            self.importance,
        )

    def swept(
        self, w: Floating[Array, "K N"], hessian: Any, cross: Any = None, alpha: Any = 0
    ) -> Solution:
        """The coded weights, in one part; `t_in` where groups were formed in order."""
        found = sweep(w, hessian, self.sweep, cross, float(alpha))
        part = pack_codes(found.codes, found.grid, self.format, w.shape)
        order = found.permutation
        t_in = None if order is None else Permutation(order)
        return Solution((part,), t_in=t_in, notes=found.notes)


@dataclass(frozen=True)
class Around:
    """A step around a method that quantizes; patterns and formats are those of `then`.

    Raises:
        TypeError: `then` quantizes no weights.
    """

    then: Any

    def __post_init__(self):
        if not isinstance(self.then, (DataFree, Calibrated)):
            raise TypeError(
                f"{type(self).__name__}.then must be a method that quantizes weights, "
                f'such as RTN("W4A16"), got {self.then!r}'
            )
        if getattr(self.then, "blockwise", False):
            raise TypeError(
                f"{type(self).__name__}.then solves single sites, and "
                f"{type(self.then).__name__} solves whole blocks; use it by itself"
            )

    @property
    def targets(self) -> Any:
        """Patterns of the sites to take."""
        return self.then.targets

    @property
    def ignore(self) -> Any:
        """Patterns of the sites to leave."""
        return self.then.ignore

    @property
    def format(self) -> Format:
        """How the weights are stored."""
        return self.then.format

    @property
    def random(self) -> bool:
        """Whether a key is needed."""
        return self.then.random

    @property
    def needed(self) -> Mapping[str, Statistic]:
        """The statistics that `then` needs."""
        return self.then.statistics if isinstance(self.then, Calibrated) else {}

    def solve_then(
        self, w: Floating[Array, "K N"], stats: Mapping[str, Any], key: Any
    ) -> Solution:
        """What `then` makes of `w`."""
        if isinstance(self.then, Calibrated):
            return self.then.solve_site(w, stats, key)
        return solution_of(self.then.solve(w, key))
