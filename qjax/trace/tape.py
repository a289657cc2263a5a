"""A program as one straight line of operations, layers of a scan one after the other.

`qjax.trace.writer` writes it: nested jits, remats and custom-derivative functions that
a parameter enters are opened; a `lax.scan` over stacked layers is unrolled; what holds
no parameter stays one operation. Layout operations on parameters are not on the tape: a
value that is still a leaf is `Weight`, and is made from the leaf where it is used.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp

from qjax.trace.contractions import Call
from qjax.trace.views import Tracked, View


@dataclass(frozen=True)
class Weight:
    """A value that is still a parameter: one layer of a leaf, under a view.

    `leaf` numbers the program's leaves; `index` are the layers taken from its leading
    axes; `casts` are the dtypes it went through on the way to `dtype`. Hashable: equal
    weights are made by equal code.
    """

    leaf: int
    index: tuple[int, ...]
    view: View
    dtype: Any
    casts: tuple[Any, ...] = ()

    def make(self, layer: Any) -> Any:
        """The value, from the leaf's layer."""
        value = self.view.of_array(layer)
        for dtype in self.casts:
            value = value.astype(dtype)
        return value.astype(self.dtype)

    @property
    def tracked(self) -> Tracked:
        """As the interpreter knows it, without an array."""
        return Tracked(None, self.view, self.leaf, self.dtype)


@dataclass(frozen=True, eq=False)
class Known:
    """An operand whose value is written on the tape."""

    value: Any


def as_typed(value: Any) -> Any:
    """A value of a jaxpr as an array of its own dtype."""
    return jnp.asarray(value, getattr(value, "dtype", None))


@dataclass(frozen=True, eq=False)
class Op:
    """One equation; operands are numbers of values, or `Known`."""

    eqn: Any
    ins: tuple[Any, ...]
    outs: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Meeting(Op):
    """An operation in which a weight meets an activation.

    Attributes:
      call: how it is read as `x[M, K] @ w[K, N]`.
      weight: the weight operand.
      number: position among the meetings of the same layer of the same leaf.
      source: equal for meetings that read the same activation in the same way.
    """

    call: Call
    weight: Weight
    number: int
    source: Any

    @property
    def x(self) -> Any:
        """The activation operand."""
        return self.ins[self.call.operand]


@dataclass(frozen=True, eq=False)
class Region(Op):
    """Control flow that is not opened: one operation, whose bodies are tapes.

    Attributes:
      kind: "scan", "cond", "while" or another primitive's name.
      bodies: of a scan its body, of a cond its branches, of a loop its test and its
        body; none where they cannot be followed.
      taken: for each body, which of its arguments its tape reads; the others are
        weights.
    """

    kind: str
    bodies: tuple["Tape", ...]
    taken: tuple[tuple[int, ...], ...]

    @property
    def meetings(self) -> list[Meeting]:
        """Where a weight meets an activation, in nested regions too."""
        return [op for body in self.bodies for op in body.meetings]


@dataclass(frozen=True, eq=False)
class Tape:
    """A program in a straight line.

    Attributes:
      ops: in order.
      inputs: the values of `f`'s inputs.
      outputs: the values that `f` returns.
      constants: arrays that the function captured, by value number.
      weights: values that are leaves, by value number.
      avals: shape and dtype of every value.
      closed: leaves that enter control flow in which nothing of them is followed, and
        its primitive.
      free: values that depend on no input, no leaf and no layer number, with the place
        of the operation that makes them. They are made anew wherever they are read, as
        the compiler would: it knows them before the program runs.
      written: constants of which free values are made, on the host.
      seams: places where a layer of a scan begins or ends; no program reaches across.
    """

    ops: tuple[Op, ...]
    inputs: tuple[int, ...]
    outputs: tuple[Any, ...]
    constants: dict[int, Any]
    weights: dict[int, Weight]
    avals: dict[int, Any]
    closed: tuple[tuple[int, str], ...]
    free: dict[int, int] = field(default_factory=dict)
    written: dict[int, Any] = field(default_factory=dict)
    seams: frozenset[int] = frozenset()

    @property
    def meetings(self) -> list[Meeting]:
        """Where a weight meets an activation, in regions too."""
        return [m for _, m in self.places]

    @property
    def places(self) -> list[tuple[int, Meeting]]:
        """Positions of operations, and the meetings that are there."""
        return [(i, m) for i, op in enumerate(self.ops) for m in meetings_of(op)]


def meetings_of(op: Op) -> Sequence[Meeting]:
    """The meetings that an operation is or holds."""
    if isinstance(op, Region):
        return op.meetings
    return [op] if isinstance(op, Meeting) else []
