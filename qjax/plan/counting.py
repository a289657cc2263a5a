"""Operations and bytes of a program, counted from its jaxpr.

What no implementation can avoid: every stored byte that is used is read once, new cache
entries and results are written once. A lookup reads its rows, a slice its part, a
decoded weight its codes; a mixture of experts reads all of them. Values in between cost
nothing.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import jax
import jax.numpy as jnp

from qjax.plan.shapes import nbytes
from qjax.trace import compat

VIEWS = frozenset(
    {"reshape", "transpose", "squeeze", "expand_dims", "slice", "dynamic_slice"}
    | {"gather", "rev", "convert_element_type", "bitcast_convert_type", "copy"}
    | {"sharding_constraint", "optimization_barrier", "broadcast_in_dim", "name"}
)
PARTIAL = frozenset({"slice", "dynamic_slice", "gather"})
WRITES = {"dynamic_update_slice": 1, "scatter": 2, "scatter-add": 2, "scatter_add": 2}
CONTRACTIONS = frozenset(
    {"dot_general", "ragged_dot", "ragged_dot_general", "conv_general_dilated"}
)
REDUCTIONS = frozenset(
    {"reduce_sum", "reduce_max", "reduce_min", "argmax", "argmin", "sort", "top_k"}
    | {"cumsum", "cumlogsumexp", "cummax", "reduce_and", "reduce_or"}
)
BODIES = frozenset({"jit", "remat", "custom"})


@dataclass
class Tally:
    """What a program does.

    Attributes:
      matrix: operations of contractions (a multiplication and an addition are two), by
        the number format they run in.
      vector: results of other arithmetic.
      read: bytes of arguments.
      written: bytes of results and of updates to arguments.
      uncounted: names of operations whose work is not known.
    """

    matrix: dict[str, int | float] = field(default_factory=lambda: defaultdict(float))
    vector: int | float = 0
    read: int | float = 0
    written: int | float = 0
    uncounted: Counter[str] = field(default_factory=Counter)

    def add(self, other: "Tally", times: int | float = 1) -> None:
        """Add what another does so many times."""
        for kind, count in other.matrix.items():
            self.matrix[kind] += count * times
        self.uncounted.update(other.uncounted)
        for name in ("vector", "read", "written"):
            setattr(self, name, getattr(self, name) + times * getattr(other, name))

    @property
    def operations(self) -> int | float:
        """Operations of all contractions."""
        return sum(self.matrix.values())

    @property
    def moved(self) -> int | float:
        """Bytes to and from memory."""
        return self.read + self.written


@dataclass(frozen=True)
class Stored:
    """A value that lies in memory: `size` bytes must be read to have it.

    `whole`: it is an argument, or one that was updated in place.
    """

    size: int | float
    whole: bool


def count(step: Any, *arguments: Any) -> Tally:
    """What `step(*arguments)` does, on all devices together; arguments are shapes."""
    closed = jax.make_jaxpr(step)(*arguments)
    jaxpr, _ = compat.body(closed)
    walk = _Walk()
    given = [Stored(nbytes(v.aval), True) for v in jaxpr.invars]
    results = walk.run(jaxpr, given)
    for var, value in zip(jaxpr.outvars, results):
        if value is None:
            walk.tally.written += nbytes(var.aval)
    return walk.tally


class _Walk:
    """One body: what each variable is, which stored ones were read, and the tally."""

    def __init__(self):
        self.tally = Tally()
        self.values: dict[Any, Stored | None] = {}
        self.seen: set[Any] = set()

    def run(self, jaxpr: Any, given: Sequence[Stored | None]) -> list[Stored | None]:
        """Count the equations; returns what the outputs are."""
        self.values.update(zip(jaxpr.invars, given, strict=True))
        for eqn in _used(jaxpr):
            results = self.equation(eqn)
            self.values.update(zip(eqn.outvars, results, strict=True))
        return [self.of(v) for v in jaxpr.outvars]

    def of(self, atom: Any) -> Stored | None:
        """Whether an operand is stored, and how much of it."""
        return None if compat.is_literal(atom) else self.values.get(atom)

    def touch(self, atom: Any) -> None:
        """Read a stored value, the first time only."""
        value = self.of(atom)
        if value is not None and atom not in self.seen:
            self.seen.add(atom)
            self.tally.read += value.size

    def equation(self, eqn: Any) -> list[Stored | None]:
        """Count one; returns what its results are."""
        kind = compat.kind(eqn)
        if kind in BODIES:
            return self.body(*compat.call_body(eqn), eqn.invars)
        if kind == "scan":
            return self.scan(eqn)
        if kind in ("cond", "while", "pallas_call", "shard_map"):
            return self.other_body(eqn, kind)
        if kind in VIEWS and self.of(eqn.invars[0]) is not None:
            return [self.view(eqn, kind)]
        if kind in WRITES:
            return [self.write(eqn, eqn.invars[WRITES[kind]])]
        return self.compute(eqn, kind)

    def view(self, eqn: Any, kind: str) -> Stored:
        """A part or another form of a stored value."""
        source, out = self.of(eqn.invars[0]), eqn.outvars[0].aval
        assert source is not None
        for index in eqn.invars[1:]:
            self.touch(index)
        if kind not in PARTIAL:
            return Stored(source.size, False)
        share = min(prod(out.shape) / max(prod(eqn.invars[0].aval.shape), 1), 1)
        return Stored(source.size * share, False)

    def write(self, eqn: Any, update: Any) -> Stored | None:
        """An update: in place if what is updated is stored."""
        for atom in eqn.invars[1:]:
            self.touch(atom)
        target = self.of(eqn.invars[0])
        if target is not None:
            self.tally.written += nbytes(update.aval)
        return None if target is None else Stored(target.size, True)

    def compute(self, eqn: Any, kind: str) -> list[Stored | None]:
        """Arithmetic: reads what is stored, gives what is not."""
        for atom in eqn.invars:
            self.touch(atom)
        out = sum(prod(v.aval.shape) for v in eqn.outvars)
        if kind in CONTRACTIONS:
            self.tally.matrix[format_of(eqn)] += operations(eqn, kind)
        elif kind not in VIEWS:
            heavy = kind in REDUCTIONS
            self.tally.vector += prod(eqn.invars[0].aval.shape) if heavy else out
        return [None] * len(eqn.outvars)

    def body(self, jaxpr: Any, _: Any, invars: Sequence[Any]) -> list[Stored | None]:
        """A nested function, entered with what its operands are."""
        inner = _Walk()
        given = [self.of(v) for v in invars]
        results = inner.run(jaxpr, given)
        # What was read outside is not read again inside, and the other way round.
        for outer, own, value in zip(invars, jaxpr.invars, given):
            if value is None or own not in inner.seen:
                continue
            if outer in self.seen:
                inner.tally.read -= value.size
            self.seen.add(outer)
        self.tally.add(inner.tally)
        return results

    def scan(self, eqn: Any) -> list[Stored | None]:
        """A loop: what it carries in place stays stored, slices are read in turn."""
        jaxpr, _ = compat.body(eqn.params["jaxpr"])
        consts, carried = compat.scan_groups(eqn)
        times = eqn.params["length"]
        given: list[Stored | None] = []
        for i, atom in enumerate(eqn.invars):
            value = self.of(atom)
            if value is not None and i >= consts + carried:
                value = Stored(value.size / max(times, 1), False)
            given.append(value)
        kept = _Walk().run(jaxpr, given)[:carried]
        in_place = [r if r is not None and r.whole else None for r in kept]
        for i, result in enumerate(in_place, start=consts):
            if result is None:
                self.touch(eqn.invars[i])
                given[i] = None
        inner = _Walk()
        inner.run(jaxpr, given)
        self.tally.add(inner.tally, times)
        return in_place + [None] * (len(eqn.outvars) - carried)

    def other_body(self, eqn: Any, kind: str) -> list[Stored | None]:
        """Branches: the one with most work; loops of unknown length: one turn."""
        for atom in eqn.invars:
            self.touch(atom)
        times = 1.0
        if kind == "pallas_call":
            times = float(prod(eqn.params["grid_mapping"].grid))
        elif kind == "shard_map":
            times = float(eqn.params["mesh"].size)
        elif kind == "while":
            self.tally.uncounted[kind] += 1
        inner = []
        for jaxpr in compat.bodies(eqn):
            walk = _Walk()
            walk.run(jaxpr, [None] * len(jaxpr.invars))
            inner.append(walk.tally)
        if inner:
            self.tally.add(max(inner, key=lambda t: t.operations), times)
        return [None] * len(eqn.outvars)


def _used(jaxpr: Any) -> list[Any]:
    """The equations that a result needs, in order."""
    wanted = {v for v in jaxpr.outvars if not compat.is_literal(v)}
    found = []
    for eqn in reversed(jaxpr.eqns):
        if eqn.effects or not wanted.isdisjoint(eqn.outvars):
            found.append(eqn)
            wanted.update(v for v in eqn.invars if not compat.is_literal(v))
    return found[::-1]


def operations(eqn: Any, kind: str) -> int | float:
    """Multiplications and additions of a contraction."""
    x, w, out = (v.aval for v in (eqn.invars[0], eqn.invars[1], eqn.outvars[0]))
    if kind == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        return 2.0 * prod(out.shape) * prod(x.shape[i] for i in contracted)
    if kind == "conv_general_dilated":
        numbers = eqn.params["dimension_numbers"]
        per_output = prod(w.shape) / w.shape[numbers.rhs_spec[0]]
        return 2.0 * prod(out.shape) * per_output
    return 2.0 * prod(out.shape) * x.shape[-1]  # ragged: a row meets one expert


def format_of(eqn: Any) -> str:
    """The number format that a contraction runs in."""
    dtypes = [jnp.dtype(v.aval.dtype) for v in eqn.invars[:2]]
    widest = max(dtypes, key=lambda d: d.itemsize)
    if all(jnp.issubdtype(d, jnp.integer) for d in dtypes):
        narrow = all(d in (jnp.dtype("int4"), jnp.dtype("uint4")) for d in dtypes)
        return "int4" if narrow else "int8"
    return "float8" if widest.itemsize == 1 else str(widest)
