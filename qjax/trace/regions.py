"""What the sites inside control flow see: a region of the tape run step by step.

A loop over time, or a branch that depends on the data, is one operation of the tape.
Before it runs, it is followed on the host for each batch, its bodies compiled like any
other stretch of a tape, and every input of the site that is watched is handed out.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp

from qjax.trace import compat
from qjax.trace.segments import Programs, Segment, live
from qjax.trace.tape import Known, Meeting, Op, Region, Tape, as_typed

Inputs = Iterator[list[Any]]
"""The operands of the watched site at every visit; None for the weight."""


@dataclass
class Visitor:
    """Follows one site through the regions that hold it.

    Attributes:
      programs: compiled segments.
      leaves: the layers of leaves that a segment reads.
      watched: the site.
    """

    programs: Programs
    leaves: Callable[[Segment], Sequence[Any]]
    watched: Meeting | None
    segments: dict[Any, Segment] = field(default_factory=dict)
    held: dict[Any, Sequence[Any]] = field(default_factory=dict)

    def seen(self, tape: Tape, op: Op, env: dict[int, Any]) -> list[list[Any]]:
        """The site's operands at every visit of an operation that is or holds it."""
        operands = self.operands(tape, env, op)
        if not isinstance(op, Region):
            return [operands]
        return list(self.visit(op, operands))

    def visit(self, region: Region, operands: Sequence[Any]) -> Any:
        """Yield the watched inputs in order; return what the region gives."""
        run = {"scan": self._scan, "cond": self._cond, "while": self._while}
        return (yield from run[region.kind](region, operands))

    def _body(self, region: Region, number: int, args: Sequence[Any]) -> Any:
        tape = region.bodies[number]
        given = [args[i] for i in region.taken[number]]
        return (yield from self._tape(tape, dict(zip(tape.inputs, given))))

    def _tape(self, tape: Tape, env: dict[int, Any]) -> Any:
        place = 0
        for stop, op in enumerate(tape.ops):
            inside = isinstance(op, Region) and self.watched in op.meetings
            if not inside and op is not self.watched:
                continue
            self._advance(tape, env, place, stop)
            place = stop
            operands = self.operands(tape, env, op)
            if isinstance(op, Region):
                outs = yield from self.visit(op, operands)
                env |= dict(zip(op.outs, outs))
                place = stop + 1
            else:
                yield operands
        self._advance(tape, env, place, len(tape.ops))
        return [self.value(tape, env, x) for x in tape.outputs]

    def _advance(self, tape: Tape, env: dict[int, Any], start: int, stop: int) -> None:
        key = id(tape), start, stop
        if key not in self.segments:
            self.segments[key] = live(tape, start, stop)
            self.held[key] = self.leaves(self.segments[key])
        segment = self.segments[key]
        constants = [tape.constants[c] for c in segment.constants]
        ins = [env[x] for x in segment.ins]
        outs = self.programs.run(tape, segment, self.held[key], constants, ins)
        env |= dict(zip(segment.outs, outs))

    def operands(self, tape: Tape, env: dict[int, Any], op: Op) -> list[Any]:
        """What an operation reads; None for weights that stay weights."""
        kept = set(op.ins) & set(tape.weights)
        if isinstance(op, Region):
            kept -= {op.ins[i] for i in _arguments(op)}
        return [None if x in kept else self.value(tape, env, x) for x in op.ins]

    def value(self, tape: Tape, env: dict[int, Any], x: Any) -> Any:
        """A value of a tape, also where no segment gives it."""
        if isinstance(x, Known):
            return as_typed(x.value)
        if x in env:
            return env[x]
        return self.programs.value(tape, x, self.leaves)

    def _scan(self, region: Region, operands: Sequence[Any]) -> Any:
        n_const, n_carry = compat.scan_groups(region.eqn)
        split = n_const + n_carry
        consts, carry = operands[:n_const], list(operands[n_const:split])
        length, rows = region.eqn.params["length"], {}
        steps = range(length)
        for step in reversed(steps) if region.eqn.params["reverse"] else steps:
            xs = [None if x is None else x[step] for x in operands[split:]]
            outs = yield from self._body(region, 0, [*consts, *carry, *xs])
            carry, rows[step] = outs[:n_carry], outs[n_carry:]
        columns = zip(*(rows[step] for step in steps))
        return [*carry, *(jnp.stack(column) for column in columns)]

    def _cond(self, region: Region, operands: Sequence[Any]) -> Any:
        last = len(region.bodies) - 1
        taken = min(max(int(operands[0]), 0), last)
        return (yield from self._body(region, taken, operands[1:]))

    def _while(self, region: Region, operands: Sequence[Any]) -> Any:
        p = region.eqn.params
        n_test, split = p["cond_nconsts"], p["cond_nconsts"] + p["body_nconsts"]
        state = list(operands[split:])
        while True:
            go = yield from self._body(region, 0, [*operands[:n_test], *state])
            if not bool(go[0]):
                return state
            args = [*operands[n_test:split], *state]
            state = yield from self._body(region, 1, args)


def _arguments(region: Region) -> set[int]:
    """The operands that some body takes as arrays."""
    p = region.eqn.params
    if region.kind == "scan":
        return set(region.taken[0])
    if region.kind == "cond":
        return {0, *(1 + i for taken in region.taken for i in taken)}
    n_test, n_body = p["cond_nconsts"], p["body_nconsts"]
    test = {i if i < n_test else i + n_body for i in region.taken[0]}
    return test | {i + n_test for i in region.taken[1]}


def stacked(visits: Sequence[list[Any]]) -> Iterator[list[Any]]:
    """Visits of one site, stacked by powers of two: few shapes, few programs."""
    start = 0
    while start < len(visits):
        count = 1 << (len(visits) - start).bit_length() - 1
        columns = zip(*visits[start : start + count])
        yield [None if c[0] is None else jnp.stack(c) for c in columns]
        start += count
