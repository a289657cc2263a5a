"""What a method is, and the checks that all of them share."""

from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Float

from qjax.core.coded import Coded
from qjax.core.formats import Format
from qjax.core.qtensor import Activation


@runtime_checkable
class DataFree(Protocol):
    """A method that needs the weights alone: a frozen, hashable dataclass.

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

    def solve(self, w: Float[Array, "... K N"], key: Any = None) -> tuple[Coded, ...]:
        """The coded parts whose sum stands for `w`; pure, and may be jitted."""
        ...


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


def check_patterns(owner: str, targets: Any, ignore: Any) -> None:
    """Refuse `targets` and `ignore` that are not patterns.

    Raises:
        TypeError: naming the field and the value.
    """
    for field, value in (("targets", targets), ("ignore", ignore)):
        many = isinstance(value, tuple) and all(isinstance(p, str) for p in value)
        if not (
            isinstance(value, str) or many or (value is None and field == "targets")
        ):
            raise TypeError(
                f"{owner}.{field} must be a pattern or a tuple of patterns, "
                f"got {value!r}"
            )
