"""Writes a traced program on a tape."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.trace import compat
from qjax.trace.contractions import CONTRACTIONS, read_call
from qjax.trace.free import is_cheap, is_whole, on_host
from qjax.trace.nested import unchanged
from qjax.trace.program import Program
from qjax.trace.reading import reading
from qjax.trace.tape import Known, Meeting, Op, Region, Tape, Weight, as_typed
from qjax.trace.views import LAYOUT, View, follow

FOLDED = (
    4096  # elements of an integer array that is evaluated while the tape is written
)
UNROLLED = 256  # steps of a loop that counts through the layers of a leaf


def write_tape(program: Program) -> Tape:
    """The straight line of a traced program."""
    writer = Writer(tuple(jnp.dtype(x.dtype) for x in program.leaves))
    leaves = [
        writer.weight(Weight(i, (), View.of(tuple(x.shape)), jnp.dtype(x.dtype)))
        for i, x in enumerate(program.leaves)
    ]
    inputs = [writer.new(jax.typeof(x)) for x in program.inputs]
    outputs = writer.run(program.jaxpr, program.consts, [*leaves, *inputs])
    return writer.tape(inputs, outputs)


@dataclass
class Writer:
    """The tape while it is written; `dtypes` are those of the leaves.

    `unknown` says whether a layer of a leaf was asked for by a number that is not known
    while the tape is written.
    """

    dtypes: tuple[Any, ...]
    ops: list[Op] = field(default_factory=list)
    constants: dict[int, Any] = field(default_factory=dict)
    weights: dict[int, Weight] = field(default_factory=dict)
    joined: dict[int, tuple[tuple[int, ...], int]] = field(default_factory=dict)
    avals: dict[int, Any] = field(default_factory=dict)
    sources: dict[int, Any] = field(default_factory=dict)
    closed: list[tuple[int, str]] = field(default_factory=list)
    meetings: dict[Any, int] = field(default_factory=dict)
    known: dict[int, Any] = field(default_factory=dict)
    free: dict[int, int] = field(default_factory=dict)
    captured: set[int] = field(default_factory=set)
    written: dict[int, Any] = field(default_factory=dict)
    seams: set[int] = field(default_factory=set)
    unknown: bool = False

    def tape(self, inputs: Sequence[int], outputs: Sequence[Any]) -> Tape:
        """What was written."""
        settled = tuple(self.settled(x) for x in outputs)
        return Tape(
            tuple(self.ops),
            tuple(inputs),
            settled,
            self.constants,
            self.weights,
            self.avals,
            tuple(dict.fromkeys(self.closed)),
            self.free,
            self.written,
            frozenset(self.seams),
        )

    def new(self, aval: Any) -> int:
        """A new value."""
        number = len(self.avals)
        self.avals[number] = aval
        return number

    def weight(self, weight: Weight) -> int:
        """A value that is a leaf."""
        number = self.new(jax.ShapeDtypeStruct(weight.view.shape, weight.dtype))
        self.weights[number] = weight
        return number

    def constant(self, value: Any) -> int:
        """A value that is there before the program runs."""
        number = self.new(jax.typeof(value))
        self.constants[number] = value
        return number

    def run(self, jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
        """Write a jaxpr; its outputs."""
        held = [self.constant(c) for c in consts]
        self.captured |= set(held)
        env = dict(zip(jaxpr.constvars, held)) | dict(zip(jaxpr.invars, args))

        def read(atom: Any) -> Any:
            return Known(atom.val) if compat.is_literal(atom) else env[atom]

        for eqn in jaxpr.eqns:
            outputs = self.equation(eqn, [read(v) for v in eqn.invars])
            env |= dict(zip(eqn.outvars, outputs))
        return [read(v) for v in jaxpr.outvars]

    def inline(self, f: Callable[..., Any], ins: Sequence[Any]) -> list[Any]:
        """Write what `f` does to values."""
        closed = jax.make_jaxpr(f)(*(self._shape(x) for x in ins))
        return self.run(*compat.body(closed), ins)

    def _shape(self, x: Any) -> Any:
        if isinstance(x, Known):
            return jax.typeof(x.value)
        aval = self.avals[x]
        return jax.ShapeDtypeStruct(aval.shape, aval.dtype)

    def equation(self, eqn: Any, ins: list[Any]) -> list[Any]:
        """Write one equation; its outputs."""
        kind = compat.kind(eqn)
        kept = [x for x in ins if self._is_leaf(x)]
        if not kept:
            return self._folded(eqn, ins) or self._append(eqn, ins)
        if kind in ("jit", "remat", "custom"):
            return self.run(*compat.call_body(eqn), ins)
        if kind == "scan":
            return self._scan(eqn, ins)
        if kind == "cond" and self._value(ins[0]) is not None:
            branch = eqn.params["branches"][int(self._value(ins[0]))]
            return self.run(*compat.body(branch), ins[1:])
        if compat.has_bodies(eqn):
            return self._enclosed(eqn, kind, ins)
        if kind == "concatenate":
            return [self._join(eqn, ins)]
        if kind in CONTRACTIONS and len(kept) == 1:
            return self._meet(eqn, ins)
        if kind in LAYOUT and self._is_leaf(ins[0]):
            return [self._follow(eqn, kind, ins)]
        return self._append(eqn, ins)

    def _append(self, eqn: Any, ins: Sequence[Any]) -> list[Any]:
        ins = [self.settled(x) for x in ins]
        outs = tuple(self.new(v.aval) for v in eqn.outvars)
        if self._is_free(eqn, ins):
            self.free |= dict.fromkeys(outs, len(self.ops))
            held = [x for x in ins if x in self.captured]
            self.written |= {x: on_host(self.constants[x]) for x in held}
        self.ops.append(Op(eqn, tuple(ins), outs))
        if compat.kind(eqn) in LAYOUT and len(ins) == 1:
            self.sources[outs[0]] = (str(eqn.params), self._source(ins[0]))
        return list(outs)

    def _is_free(self, eqn: Any, ins: Sequence[Any]) -> bool:
        """Whether the compiler knows the value before the program runs."""

        def known(x: Any) -> bool:
            if x in self.captured:
                return self.avals[x].size <= FOLDED
            return isinstance(x, Known) or x in self.free

        return all(map(known, ins)) and not eqn.effects and is_cheap(eqn)

    def _source(self, x: Any) -> Any:
        """Layout copies of one activation keep one identity."""
        return self.sources.get(x, x) if isinstance(x, int) else repr(x)

    def _is_leaf(self, x: Any) -> bool:
        return isinstance(x, int) and (x in self.weights or x in self.joined)

    def settled(self, x: Any) -> Any:
        """A value that an operation can read: joined weights become an array."""
        if not isinstance(x, int) or x not in self.joined:
            return x
        pieces, axis = self.joined[x]
        shapes = [self._shape(p) for p in pieces]
        closed = jax.make_jaxpr(lambda *p: jnp.concatenate(p, axis))(*shapes)
        (eqn,) = compat.body(closed)[0].eqns
        return self._append(eqn, pieces)[0]

    def _value(self, x: Any) -> Any:
        if isinstance(x, Known):
            return x.value
        return self.known.get(x, self.constants.get(x))

    def _folded(self, eqn: Any, ins: list[Any]) -> list[Any] | None:
        """Whole numbers that are known now: loop counters, layer numbers."""
        values = [self._value(x) for x in ins]
        whole = (
            eqn.outvars
            and not eqn.effects
            and all(
                v.aval.size <= FOLDED and is_whole(v.aval.dtype) for v in eqn.outvars
            )
        )
        if not whole or any(v is None or np.size(v) > FOLDED for v in values):
            return None
        outs = self._append(eqn, ins)
        self.known |= dict(zip(outs, compat.bind(eqn, values)))
        return outs

    def _follow(self, eqn: Any, kind: str, ins: list[Any]) -> Any:
        source = self.weights.get(ins[0])
        if source is None:
            return self._append(eqn, ins)[0]
        moved = follow(eqn, kind, source.tracked, list(ins[1:]))
        if moved is None:
            return self._append(eqn, ins)[0]
        index = source.index
        if moved.picks:
            length, layer = moved.picks[-1]
            layer = self._value(ins[1]) if layer is None else layer
            if layer is None:
                self.unknown = True
                return self._append(eqn, ins)[0]
            index = (*index, min(max(int(layer), 0), length - 1))
        casts = source.casts
        if moved.dtype != source.dtype != self.dtypes[source.leaf]:
            casts = (*casts, source.dtype)  # two changes of dtype round twice
        return self.weight(Weight(source.leaf, index, moved.view, moved.dtype, casts))

    def _join(self, eqn: Any, ins: list[Any]) -> int:
        axis, pieces = eqn.params["dimension"], []
        for x in ins:
            inner = self.joined.get(x)
            pieces += inner[0] if inner and inner[1] == axis else (self.settled(x),)
        number = self.new(eqn.outvars[0].aval)
        self.joined[number] = (tuple(pieces), axis)
        return number

    def _meet(self, eqn: Any, ins: list[Any]) -> list[Any]:
        position = next(i for i, x in enumerate(ins) if self._is_leaf(x))
        if ins[position] in self.joined:
            return self._meet_joined(eqn, ins, position)
        weight = self.weights[ins[position]]
        call = read_call(eqn, weight.tracked, position)
        if isinstance(call, str):
            return self._append(eqn, ins)
        outs = self._append(eqn, ins)
        op = self.ops.pop()
        key = weight.leaf, weight.index
        number = self.meetings.get(key, 0)
        self.meetings[key] = number + 1
        seen = (self._source(op.ins[call.operand]), *reading(op, call, weight.view))
        self.ops.append(Meeting(op.eqn, op.ins, op.outs, call, weight, number, seen))
        return outs

    def _meet_joined(self, eqn: Any, ins: list[Any], position: int) -> list[Any]:
        """`x @ [a, b]` as `[x @ a, x @ b]`."""
        pieces, axis = self.joined[ins[position]]
        if eqn.primitive.name != "dot_general":
            return self._append(eqn, ins)
        contract, batch = (tuple(d[position]) for d in eqn.params["dimension_numbers"])
        if axis in contract + batch:
            return self._append(eqn, ins)
        ndim = len(self.avals[ins[position]].shape)
        free = [d for d in range(ndim) if d not in contract + batch].index(axis)
        x_ndim = len(eqn.invars[1 - position].aval.shape)
        where = len(batch) + free if position == 0 else x_ndim - len(contract) + free
        outs = []
        for piece in pieces:
            given = [*ins[:position], piece, *ins[position + 1 :]]
            outs += self.inline(lambda *ab: compat.bind(eqn, ab)[0], given)
        return self.inline(lambda *ys: jnp.concatenate(ys, where), outs)

    def _enclosed(self, eqn: Any, kind: str, ins: list[Any]) -> list[Any]:
        bodies, taken = self._bodies(eqn, kind, ins)
        outs = self._append(eqn, ins)
        op = self.ops.pop()
        region = Region(op.eqn, op.ins, op.outs, kind, bodies, taken)
        self.ops.append(region)
        met = {m.weight.leaf for m in region.meetings}
        for x in ins:
            weights = self.joined[x][0] if x in self.joined else (x,)
            entering = [self.weights[w].leaf for w in weights if w in self.weights]
            self.closed += [(leaf, kind) for leaf in entering if leaf not in met]
        return outs

    def _bodies(self, eqn: Any, kind: str, ins: list[Any]) -> Any:
        """The bodies of control flow as tapes, and the arguments that they take."""
        p = eqn.params
        if kind == "cond":
            given: list[Any] = [(branch, ins[1:], set()) for branch in p["branches"]]
        elif kind == "scan":
            n_const, n_carry = compat.scan_groups(eqn)
            given = [_held(p["jaxpr"], ins, n_const, n_const + n_carry)]
        elif kind == "while":
            n_test, split = p["cond_nconsts"], p["cond_nconsts"] + p["body_nconsts"]
            body = _held(p["body_jaxpr"], ins[n_test:], p["body_nconsts"], len(ins))
            moving = {i - split + n_test + n_test for i in body[2]}
            test = p["cond_jaxpr"], [*ins[:n_test], *ins[split:]], moving
            given = [test, body]
        else:
            given = []
        tapes = [self._inside(closed, args, moving) for closed, args, moving in given]
        return tuple(t for t, _ in tapes), tuple(t for _, t in tapes)

    def _inside(self, closed: Any, ins: Sequence[Any], moving: set[int]) -> Any:
        """A body as a tape; weights stay weights unless they are `moving`."""
        inner = Writer(self.dtypes, avals=self.avals, meetings=self.meetings)
        jaxpr, consts = compat.body(closed)
        args, taken = [], []
        for i, (x, v) in enumerate(zip(ins, jaxpr.invars)):
            if x in self.weights and i not in moving:
                args.append(inner.weight(self.weights[x]))
            else:
                args.append(inner.new(v.aval))
                taken.append(i)
        outputs = inner.run(jaxpr, consts, args)
        self.unknown |= inner.unknown
        self.closed += inner.closed
        return inner.tape([args[i] for i in taken], outputs), tuple(taken)

    def _scan(self, eqn: Any, ins: list[Any]) -> list[Any]:
        """Layer by layer, where layers of a leaf are scanned or counted through."""
        n_const, n_carry = compat.scan_groups(eqn)
        split = n_const + n_carry
        stacked = any(self._is_leaf(x) for x in ins[split:])
        if not eqn.params["length"] or not (stacked or self._counts(eqn, ins)):
            return self._enclosed(eqn, "scan", ins)
        ins = [x if self._is_leaf(x) else self._array(x) for x in ins]
        xs = ins[split:]
        jaxpr, consts = compat.body(eqn.params["jaxpr"])
        fixed = unchanged(jaxpr, range(n_const, split))
        carry = [
            x if i in fixed else self._array(x)
            for i, x in enumerate(ins[n_const:split], start=n_const)
        ]
        length, before = eqn.params["length"], dict(self.meetings)
        layers, counts = range(length), {}
        rows: dict[int, list[Any]] = {}
        for layer in reversed(layers) if eqn.params["reverse"] else layers:
            self.seams.add(len(self.ops))
            self.meetings = dict(before)  # the sites of a shared leaf are the same ones
            taken = [self._layer(x, layer) for x in xs]
            out = self.run(jaxpr, consts, [*ins[:n_const], *carry, *taken])
            carry = [
                x if n_const + i in fixed else self._array(x)
                for i, x in enumerate(out[:n_carry])
            ]
            rows[layer] = [self._array(x) for x in out[n_carry:]]
            counts |= self.meetings
        self.seams.add(len(self.ops))
        self.meetings = counts
        columns = zip(*(rows[layer] for layer in layers))
        stacks = [self.inline(lambda *y: jnp.stack(y), list(c))[0] for c in columns]
        return [*carry, *stacks]

    def _counts(self, eqn: Any, ins: Sequence[Any]) -> bool:
        """Whether a loop counts through the layers of a leaf, `w[i]`."""
        n_const, _ = compat.scan_groups(eqn)
        counted = any(self._value(x) is not None for x in ins[n_const:])
        if not counted or eqn.params["length"] > UNROLLED:
            return False
        trial = Writer(self.dtypes, avals=dict(self.avals), weights=dict(self.weights))
        trial.joined = dict(self.joined)
        trial._bodies(eqn, "scan", list(ins))
        return trial.unknown

    def _array(self, x: Any) -> Any:
        """A value on its way into or out of a loop: an operand of its layers.

        What the compiler knows outside it does not know inside.
        """
        if self._value(x) is not None:
            return self.constant(as_typed(self._value(x)))
        if x in self.free:
            return self.inline(jax.lax.optimization_barrier, [x])[0]
        return self.settled(x)

    def _layer(self, x: Any, layer: int) -> Any:
        """One layer of what is scanned over."""
        weight = self.weights.get(x)
        inner = None if weight is None else weight.view.first()
        if weight is not None and inner is not None:
            index = (*weight.index, layer)
            return self.weight(replace(weight, index=index, view=inner))
        value = self._value(x)
        if value is not None and np.size(value) <= FOLDED:
            return self.constant(value[layer])
        # The number is an operand, so that the layers are one program.
        at = self.constant(jnp.asarray(layer, jnp.int32))
        take = partial(jax.lax.dynamic_index_in_dim, axis=0, keepdims=False)
        return self.inline(take, [self.settled(x), at])[0]


def _held(closed: Any, ins: Sequence[Any], start: int, stop: int) -> Any:
    """A body, its arguments, and which of those another step may change."""
    jaxpr, _ = compat.body(closed)
    carried = range(start, min(stop, len(ins)))
    moving = set(range(start, len(ins))) - unchanged(jaxpr, carried)
    return closed, list(ins), moving
