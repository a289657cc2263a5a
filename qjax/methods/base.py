"""What a method is, and the checks that all of them share."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from itertools import accumulate
from operator import add
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from qjax.core.coded import Coded
from qjax.core.formats import Format
from qjax.core.pytrees import register
from qjax.core.qtensor import Activation, factor
from qjax.core.statistics import Statistic


@runtime_checkable
class DataFree(Protocol):
    """A method that needs the weights alone: a frozen, hashable dataclass.

    One that has `shared`, as a `Calibrated` one does, and it is true, takes matrices
    with one input side by side where the format has a second scale: they then share it.

    Attributes:
      targets: patterns of the sites it takes; None takes its default.
      ignore: patterns of the sites it leaves.
    """

    targets: Any
    ignore: Any

    @property
    def format(self) -> Format:
        """How the weights are stored."""
        ...

    @property
    def activation(self) -> Activation | None:
        """How the input of the contraction is coded; None leaves it in float."""
        ...

    @property
    def random(self) -> bool:
        """Whether `solve` draws random numbers, and so needs a key."""
        ...

    def solve(
        self, w: Float[Array, "... K N"], key: Any = None
    ) -> "tuple[Coded, ...] | Solution":
        """What stands for `w`: coded parts, or a solution; pure, and may be jitted."""
        ...


@dataclass(frozen=True)
class Solution:
    """What a solver found for `w[K, N]`: parts of `W = T_in (sum Q_i + L R + S)`.

    A pytree. `notes` are arrays that the report shows: `damping` (the fraction that was
    needed), `dead` (input features that were always zero), and a method's own.
    `scale` and `zero` are the static activation range of `x T_in`, where the method and
    no calibrator finds it.
    """

    parts: tuple[Coded, ...]
    t_in: Any = None
    left: Any = None
    right: Any = None
    sparse: Any = None
    bias: Any = None
    notes: Mapping[str, Any] = field(default_factory=dict)
    scale: Any = None
    zero: Any = None

    def decoded(self) -> Float32[Array, "... K N"]:
        """The weight that it stands for; the bias is not part of it."""
        terms = [part.decode(jnp.float32) for part in self.parts]
        if self.left is not None:
            pair = (factor(each, jnp.float32) for each in (self.left, self.right))
            terms.append(jnp.matmul(*pair, precision="highest"))
        total = reduce(add, terms)
        if self.sparse is not None:
            total = total + self.sparse.dense(total.shape, jnp.float32)
        return total if self.t_in is None else self.t_in.left(total)

    def split(self, widths: Sequence[int]) -> "list[Solution]":
        """The solutions of matrices so wide that were solved side by side."""
        ends = list(accumulate(widths))
        return [self._columns(*pair) for pair in zip([0, *ends], ends)]

    def _columns(self, start: int, stop: int) -> "Solution":
        def last(x: Any) -> Any:
            return None if x is None else x[..., start:stop]

        return replace(
            self,
            parts=tuple(part.columns(start, stop) for part in self.parts),
            right=last(self.right),
            bias=last(self.bias),
        )


register(
    Solution,
    ("parts", "t_in", "left", "right", "sparse", "bias", "notes", "scale", "zero"),
)


def solution_of(found: tuple[Coded, ...] | Solution) -> Solution:
    """What a data-free method found, as a solution."""
    return found if isinstance(found, Solution) else Solution(found)


@runtime_checkable
class Calibrated(Protocol):
    """A method that needs statistics of the inputs of each site.

    A frozen, hashable dataclass. Beside the attributes of `DataFree`:

    Attributes:
      statistics: what to accumulate over the site's input, by name.
      full_precision: whether the statistics also see the input that the site has in
        the full-precision model (`Cross`); a second stream then runs beside.
      shared: whether the columns of `w[K, N]` are solved independently of each other,
        but for a second scale, so that sites with one input may be solved side by side
        along N.
    """

    targets: Any
    ignore: Any

    @property
    def format(self) -> Format:
        """How the weights are stored."""
        ...

    @property
    def activation(self) -> Activation | None:
        """How the input of the contraction is coded; None leaves it in float."""
        ...

    @property
    def random(self) -> bool:
        """Whether `solve_site` draws random numbers, and so needs a key."""
        ...

    @property
    def statistics(self) -> Mapping[str, Statistic]:
        """What to accumulate over the site's input, by name."""
        ...

    @property
    def full_precision(self) -> bool:
        """Whether a full-precision stream runs beside the quantized one."""
        ...

    @property
    def shared(self) -> bool:
        """Whether columns are independent, but for a second scale."""
        ...

    def solve_site(
        self, w: Float[Array, "K N"], stats: Mapping[str, Any], key: Any = None
    ) -> Solution:
        """The quantized site, from finalized `statistics`; pure, jitted, vmapped."""
        ...


@dataclass(frozen=True)
class Group:
    """Sites that read one activation, as a transform sees them.

    Attributes:
      names: of the sites.
      ws: their weights `w[K, N]`.
      formats: the weight formats that they will be stored in.
      stats: finalized statistics of the activation, by the step's names.
      tied: `values[K]` averaged over features that must share a scale.
      errors: `errors(scales[G, K], module)`: for each candidate the squared error of
        the output with weights `Q(diag(s) w) / s`, of the module around the sites or
        (False) of the sites themselves.
      producer: weights `[K_before, K]` of the linear whose outputs are the features,
        where that is what a scale is folded into; else None.
    """

    names: tuple[str, ...]
    ws: tuple[Any, ...]
    formats: tuple[Format, ...]
    stats: Mapping[str, Any]
    tied: Callable[[Any], Any]
    errors: Callable[[Any, bool], Any]
    producer: Any = None


@dataclass(frozen=True)
class Choice:
    """What a transform chose for a group: `scale[K]`, or None to leave it.

    `error_before` and `error` are squared errors without and with the scale, where the
    method measures them; `notes` go to the report.
    """

    scale: Any
    error_before: float | None = None
    error: float | None = None
    notes: Mapping[str, float] = field(default_factory=dict)
    remark: str = ""


def positive_integer(owner: str, field: str, value: Any) -> None:
    """Refuse what is not a whole number above zero.

    Raises:
        ValueError: naming the field and the value.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{owner}.{field} must be a whole number >= 1, got {value!r}")


def within(
    owner: str, field: str, value: Any, low: float | int, high: float | int
) -> None:
    """Refuse a number outside `(low, high]`.

    Raises:
        ValueError: naming the field, the value and the range.
    """
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not low < value <= high:
        raise ValueError(f"{owner}.{field} must be in ({low}, {high}], got {value!r}")


def check_format(owner: str, field: str, value: Any, required: bool = False) -> None:
    """Refuse what is no number format; None stands for no format unless required.

    Raises:
        ValueError: naming the field and the value.
    """
    absent = value is None and not required
    if not absent and not isinstance(value, Format):
        raise ValueError(
            f"{owner}.{field} must be a format such as Int(8), got {value!r}"
        )


def check_patterns(owner: str, targets: Any, ignore: Any) -> None:
    """Refuse `targets` and `ignore` that are not patterns.

    Raises:
        TypeError: naming the field and the value.
    """
    for name, value in (("targets", targets), ("ignore", ignore)):
        many = isinstance(value, tuple) and all(isinstance(p, str) for p in value)
        if not (
            isinstance(value, str) or many or (value is None and name == "targets")
        ):
            raise TypeError(
                f"{owner}.{name} must be a pattern or a tuple of patterns, "
                f"got {value!r}"
            )
