"""What every kind of nested body needs: events out, parameters in and out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from qjax.trace.interpret import Body, Event, piece
from qjax.trace.views import Joined, Tracked


@dataclass(eq=False)
class Notes:
    """What tracing a body left behind: its events."""

    events: Sequence[Event] = field(default_factory=tuple)

    def keep(self, events: Sequence[Event]) -> list[Any]:
        """Note events; what they observed is returned, to leave the body as values."""
        self.events = tuple(replace(e, seen=None) for e in events)
        return [e.seen for e in events]

    def refuse(self, events: Sequence[Event], primitive: str) -> None:
        """Note the events of a body that observations cannot leave.

        Raises:
            ValueError: something was observed.
        """
        if any(e.seen is not None for e in events):
            raise ValueError(
                f"an activation inside {primitive} cannot be observed; there, take a "
                "range that is dynamic or learned"
            )
        self.events = tuple(events)

    def with_seen(self, seen: Sequence[Any]) -> list[Event]:
        """The events, with what was observed as it came out of the body."""
        return [replace(e, seen=s) for e, s in zip(self.events, seen)]


def sources_of(outer: Body, eqn: Any) -> list[Any]:
    """Which activations an equation reads."""
    return [outer.source(v) for v in eqn.invars]


def without(
    outer: Body, eqn: Any, operands: Sequence[Any], keep: Callable[[int, Tracked], bool]
) -> list[Any]:
    """Arrays in place of the parameters that a body of this kind cannot take."""
    name, out = eqn.primitive.name, []
    for i, x in enumerate(operands):
        takes = isinstance(x, Tracked) and keep(i, x)
        if takes or not isinstance(x, (Tracked, Joined)):
            out.append(x)
        else:
            out += outer.as_floats(name, [x], f"enters {name}")
    return out


def restore(outputs: Sequence[Any], operands: Sequence[Any]) -> list[Any]:
    """Parameters that leave a body get back the number they have outside."""

    def one(x: Any) -> Any:
        if isinstance(x, Joined):
            return replace(x, pieces=tuple(one(p) for p in x.pieces))
        if not isinstance(x, Tracked):
            return x
        origin = piece(operands, x.leaf)
        picks = origin.picks + x.picks
        return replace(x, leaf=origin.leaf, picks=picks, base=origin.base)

    return [one(x) for x in outputs]


def unchanged(jaxpr: Any, carried: range) -> set[int]:
    """Carried values that the body returns as they came."""
    pairs = zip(carried, jaxpr.outvars)
    return {i for i, out in pairs if out is jaxpr.invars[i]}
