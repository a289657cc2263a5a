"""Pieces of a tape, compiled once for each structure.

Two pieces share a program if their equations, shapes and every array that they hold are
equal: nested constants are compared by content, never by the text of a jaxpr.
"""

import hashlib
import re
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np

from qjax.core.qtensor import QTensor, SiteActs
from qjax.ops.activations import coded_values
from qjax.trace import compat
from qjax.trace.apply import low_bit
from qjax.trace.control import interpreter
from qjax.trace.free import is_key
from qjax.trace.tape import Known, Meeting, Op, Region, Tape, Weight
from qjax.trace.views import Tracked, as_array


class Key:
    """A large tuple, hashed once."""

    def __init__(self, parts: tuple[Any, ...]):
        self.parts, self.hash = parts, hash(parts)

    def __hash__(self) -> int:
        return self.hash

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Key):
            return NotImplemented
        return self is other or (self.hash, self.parts) == (other.hash, other.parts)


@dataclass(frozen=True, eq=False)
class Segment:
    """A stretch of a tape as a function of what enters it.

    Attributes:
      ops: the operations.
      ins: activations that enter, by value number.
      leaves: `(leaf, index)` of the layers of leaves that are read.
      constants: captured arrays that are read, by value number.
      outs: activations that later operations (or the caller) read.
      key: equal for segments that may share a program.
    """

    ops: tuple[Op, ...]
    ins: tuple[int, ...]
    leaves: tuple[tuple[int, tuple[int, ...]], ...]
    constants: tuple[int, ...]
    outs: tuple[int, ...]
    key: Any


def cut(tape: Tape, start: int, stop: int, wanted: Sequence[int]) -> Segment:
    """The operations `start:stop` and the free ones that they read, for `wanted`."""
    return stretch(tape, _with_free(tape, start, stop, wanted), wanted)


def stretch(tape: Tape, ops: Sequence[Op], wanted: Sequence[int]) -> Segment:
    """Operations of a tape, in its order, for `wanted`."""
    made = {out for op in ops for out in op.outs}
    reads = [x for op in ops for x in op.ins if isinstance(x, int)]
    reads = list(dict.fromkeys(x for x in reads if x not in made))
    leaves = [tape.weights[x] for x in reads if x in tape.weights]
    constants = [x for x in reads if x in tape.constants]
    return Segment(
        tuple(ops),
        tuple(x for x in reads if x not in tape.weights and x not in tape.constants),
        tuple(dict.fromkeys((w.leaf, w.index) for w in leaves)),
        tuple(x for x in constants if x not in tape.written),
        tuple(x for x in wanted if x in made),
        Key(_key(tape, ops, wanted)),
    )


def live(tape: Tape, start: int, stop: int) -> Segment:
    """A stretch of the tape with everything that later operations read of it."""
    made = {x for op in tape.ops[start:stop] for x in op.outs if x not in tape.free}
    later = [x for op in tape.ops[stop:] for x in op.ins if isinstance(x, int)]
    results = [x for x in tape.outputs if isinstance(x, int)]
    read = dict.fromkeys([*later, *results])
    return cut(tape, start, stop, [x for x in read if x in made])


def _with_free(tape: Tape, start: int, stop: int, wanted: Any) -> tuple[Op, ...]:
    """Operations of a stretch, each free one in front of the first that reads it."""
    ops: list[Op] = []
    there: set[int] = set()

    def need(x: Any) -> None:
        place = tape.free.get(x) if isinstance(x, int) else None
        if place is not None and place not in there:
            there.add(place)
            add(tape.ops[place])

    def add(op: Op) -> None:
        for x in op.ins:
            need(x)
        ops.append(op)

    for op in tape.ops[start:stop]:
        if not (op.outs and op.outs[0] in tape.free):
            add(op)
    for x in wanted:
        need(x)
    return tuple(ops)


@dataclass(frozen=True)
class CodingSite:
    """A layer in float whose site codes its input, while weights are learned.

    Attributes:
      inner: what `x T_in`, coded, is contracted with.
      acts: how the input is coded.
      layer: `T_in` times it, for what reads the layer otherwise.
    """

    inner: Any
    acts: SiteActs
    layer: Any


def evaluate(tape: Tape, segment: Segment, leaves: Any, consts: Any, ins: Any) -> Any:
    """The segment's outputs.

    A leaf may be an array, or at its site a QTensor or a `CodingSite`.
    """
    held = dict(zip(segment.leaves, leaves))
    env = dict(zip(segment.constants, consts)) | dict(zip(segment.ins, ins))
    read = reader(tape, held, env)
    for op in segment.ops:
        with compat.context(op.eqn):
            env |= dict(zip(op.outs, outputs_of(op, tape, read, held)))
    return [env[x] for x in segment.outs]


def reader(
    tape: Tape, held: dict[Any, Any], env: dict[int, Any]
) -> Callable[[Any], Any]:
    """What an operand is: written on the tape, made of a leaf, or in `env`."""

    def read(x: Any) -> Any:
        if isinstance(x, Known):
            return x.value
        if x in tape.weights:
            return _made(tape.weights[x], held)
        return tape.written[x] if x in tape.written else env[x]

    return read


def _made(weight: Weight, held: dict[Any, Any]) -> Any:
    layer = held[weight.leaf, weight.index]
    if isinstance(layer, CodingSite):
        return weight.make(layer.layer)
    return weight.make(layer.dequantize() if isinstance(layer, QTensor) else layer)


def outputs_of(
    op: Op, tape: Tape, read: Callable[[Any], Any], held: dict[Any, Any]
) -> list[Any]:
    """What an operation gives, given its operands and the layers of leaves."""
    if isinstance(op, Meeting):
        leaf = held[op.weight.leaf, op.weight.index]
        if isinstance(leaf, QTensor):
            y = meet(op, leaf, read(op.x), read)
            if y is not None:
                return [y]
        if isinstance(leaf, CodingSite) and op.call.kind == "dot":
            return [_coding(op, leaf, read)]
    if isinstance(op, Region) and any(isinstance(x, QTensor) for x in held.values()):
        return _entered(op, tape, read, held)
    return compat.bind(op.eqn, [read(x) for x in op.ins])


def _coding(op: Meeting, leaf: CodingSite, read: Callable[[Any], Any]) -> Any:
    """A weight in float at its site, and its input as it will be coded."""
    x, back = jax.vjp(op.call.matrix, read(op.x))
    x = x if leaf.acts.t_in is None else leaf.acts.t_in(x)
    given = [op.weight.make(leaf.inner)] * 2
    # The arrangement only moves values, so that its transpose is its inverse.
    given[op.call.operand] = back(coded_values(x, leaf.acts))[0]
    return compat.bind(op.eqn, given)[0]


def _entered(
    op: Op, tape: Tape, read: Callable[[Any], Any], held: dict[Any, Any]
) -> list[Any]:
    """Control flow with quantized leaves, as `apply` runs it."""

    def operand(x: Any) -> Any:
        weight = None if isinstance(x, Known) else tape.weights.get(x)
        if weight is None:
            return read(x)
        leaf = held[weight.leaf, weight.index]
        value = leaf if isinstance(leaf, QTensor) else _made(weight, held)
        return Tracked(value, weight.view, weight.leaf, weight.dtype)

    atoms = [v for v in op.eqn.invars if not compat.is_literal(v)]
    given = {v: operand(x) for v, x in zip(op.eqn.invars, op.ins) if v in atoms}
    body = interpreter(low_bit)
    single = SimpleNamespace(
        constvars=(), invars=list(given), eqns=[op.eqn], outvars=op.eqn.outvars
    )
    return [as_array(y) for y in body.run(single, (), list(given.values()))]


def meet(op: Meeting, leaf: QTensor, x: Any, read: Callable[[Any], Any]) -> Any:
    """A quantized leaf at its site, as `apply` runs it; None where it cannot."""
    weight = op.weight
    tracked = Tracked(leaf, weight.view, weight.leaf, weight.dtype)
    operands: list[Any] = [None] * len(op.ins)
    for i, each in enumerate(op.ins):
        is_weight = not isinstance(each, Known) and i != op.call.operand
        operands[i] = tracked if is_weight and i < 2 else read(each)
    operands[op.call.operand] = x
    return low_bit(op.eqn, op.call, tracked, operands, op.number)[0]


@dataclass(frozen=True)
class Code:
    """A segment as a static argument: equal where the program would be.

    JAX's own cache then holds the compiled programs, from one pass to the next.
    """

    key: Key
    piece: tuple[Tape, Segment] = field(compare=False, repr=False)


@partial(jax.jit, static_argnums=0)
def run_code(code: Code, leaves: Any, consts: Any, ins: Any) -> list[Any]:
    """`evaluate`, compiled; segments of equal structure share the program."""
    return evaluate(*code.piece, leaves, consts, ins)


@dataclass
class Programs:
    """Runs segments; `compiled` counts the programs that it needed."""

    used: set[Any] = field(default_factory=set)

    @property
    def compiled(self) -> int:
        """How many different programs there are."""
        return len(self.used)

    def run(
        self, tape: Tape, segment: Segment, leaves: Any, consts: Any, ins: Any
    ) -> list[Any]:
        """The segment's outputs."""
        if not segment.outs:
            return []
        code = Code(segment.key, (tape, segment))
        return self.call(run_code, code, leaves, consts, ins)

    def call(self, program: Callable[..., Any], code: Code, *given: Any) -> Any:
        """A compiled program of a segment, counted."""
        given = jax.tree.map(_typed, given)
        shapes = tuple(str(jax.typeof(x)) for x in jax.tree.leaves(given))
        self.used.add((program, code.key, jax.tree.structure(given), shapes))
        return program(code, *given)

    def value(self, tape: Tape, x: Any, leaves: Callable[[Segment], Any]) -> Any:
        """A value that no stretch of the tape gives: constant, free, or a leaf."""
        if x in tape.constants:
            return tape.constants[x]
        if x in tape.free:
            return self.run(tape, cut(tape, 0, 0, [x]), [], [], [])[0]
        weight = tape.weights[x]
        empty = cut(tape, 0, 0, [])
        (layer,) = leaves(replace(empty, leaves=((weight.leaf, weight.index),)))
        return _made(weight, {(weight.leaf, weight.index): layer})


def _typed(x: Any) -> Any:
    # A Python number would be traced as weakly typed.
    return x if hasattr(x, "dtype") else np.asarray(x)


def _key(tape: Tape, ops: Sequence[Op], wanted: Sequence[int]) -> Any:
    """The structure of operations, with values renamed by their first appearance."""
    names: dict[Any, int] = {}
    leaf_names: dict[Any, int] = {}

    def name(x: Any) -> Any:
        if isinstance(x, Known):
            return ("known", *digest(x.value))
        if x in tape.written:
            return ("known", *digest(tape.written[x]))
        if x in tape.weights:
            weight = tape.weights[x]
            leaf = leaf_names.setdefault((weight.leaf, weight.index), len(leaf_names))
            return "weight", leaf, weight.view, str(weight.dtype), weight.casts
        aval = tape.avals[x]
        number = names.setdefault(x, len(names))
        kind = "constant" if x in tape.constants else "value"
        return kind, number, tuple(aval.shape), str(aval.dtype)

    rows = [
        (structure_of(op.eqn), *map(name, op.ins), *map(name, op.outs)) for op in ops
    ]
    made = {out for op in ops for out in op.outs}
    return tuple(rows), tuple(names[x] for x in wanted if x in made)


def structure_of(eqn: Any) -> Any:
    """An equation without its operands, hashable; what only gradients read is left."""
    kind = compat.kind(eqn)
    if kind in ("jit", "remat", "custom"):
        return kind, _jaxpr(*compat.call_body(eqn))
    params = {k: v for k, v in eqn.params.items() if k not in ("linear", "name")}
    return eqn.primitive.name, _static(params)


def _jaxpr(jaxpr: Any, consts: Sequence[Any]) -> Any:
    names: dict[Any, int] = {}

    def name(v: Any) -> Any:
        if compat.is_literal(v):
            return ("known", *digest(v.val))
        return names.setdefault(v, len(names)), str(v.aval)

    top = tuple(name(v) for v in (*jaxpr.constvars, *jaxpr.invars))
    rows = tuple(
        (structure_of(e), *map(name, e.invars), *map(name, e.outvars))
        for e in jaxpr.eqns
    )
    held = tuple(digest(c) for c in consts)
    return top, rows, tuple(name(v) for v in jaxpr.outvars), held


def text_of(jaxpr: Any, consts: Sequence[Any]) -> str:
    """A program with what it captured as text that is the same in every process."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(_jaxpr(jaxpr, consts)))


def digest(value: Any) -> tuple[Any, ...]:
    """An array by its content."""
    if isinstance(value, jax.Array) and is_key(value):
        return str(jax.random.key_impl(value)), *digest(jax.random.key_data(value))
    array = np.asarray(value)
    content = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
    return array.shape, str(array.dtype), content


def _static(value: Any) -> Any:
    """A parameter of an equation as something hashable and comparable."""
    if isinstance(value, dict):
        return tuple((k, _static(value[k])) for k in sorted(value, key=str))
    if isinstance(value, (tuple, list)):
        return tuple(_static(v) for v in value)
    if isinstance(value, (set, frozenset)):
        return tuple(sorted(map(_static, value), key=repr))
    if compat.is_jaxpr(value):
        return _jaxpr(*compat.body(value))
    if isinstance(value, (np.ndarray, jax.Array)):
        return digest(value)
    if isinstance(value, (float, complex)):
        return repr(value)
    if isinstance(value, Hashable):
        return type(value).__name__, value
    return Same(value)


class Same:
    """What cannot be compared is equal to itself alone."""

    def __init__(self, value: Any):
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.value is other.value
