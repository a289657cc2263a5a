"""Re-emission of equations that hold bodies, with parameters passing through them."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp

from qjax.core.qtensor import Stacked
from qjax.trace import compat, sharded
from qjax.trace.interpret import Body, Event, Rule
from qjax.trace.views import Joined, Tracked, View, as_array


class QuantizationWarning(UserWarning):
    """Something ran differently from what the user may expect."""


@dataclass
class Notes:
    """What tracing a body left behind: its events."""

    events: Sequence[Event] = field(default_factory=tuple)


def interpreter(rule: Rule, everything: bool = False) -> Body:
    """A fresh interpreter for a whole program."""
    return Body(rule, ENTER, everything)


def _sources(outer: Body, eqn: Any) -> list[Any]:
    return [outer.source(v) for v in eqn.invars]


def _plain(outer: Body, eqn: Any, operands: Sequence[Any], keep: Any) -> list[Any]:
    """Arrays in place of the parameters that a body of this kind cannot take."""
    name, out = eqn.primitive.name, []
    for i, x in enumerate(operands):
        takes = isinstance(x, Tracked) and keep(i, x)
        if takes or not isinstance(x, (Tracked, Joined)):
            out.append(x)
        else:
            out += outer.as_floats(name, [x], f"enters {name}")
    return out


def enter_jit(outer: Body, eqn: Any, operands: list[Any], number: int) -> list[Any]:
    """A nested jit stays one: layers of equal structure are traced and lowered once."""
    jaxpr, consts = compat.call_body(eqn)
    given = outer.renumber(operands)
    key = (id(jaxpr), jax.tree.structure(given), outer.everything)
    if key not in outer.cache:
        notes = Notes()

        def call(*args: Any) -> list[Any]:
            inner = outer.nested()
            out = inner.run(jaxpr, consts, args)
            notes.events = tuple(inner.events)
            return out

        call.__name__ = str(eqn.params.get("name", "jit"))
        # The jaxpr is kept with its entry: an id is unique only while it lives.
        outer.cache[key] = (jax.jit(call), notes, jaxpr)
    jitted, notes, _ = outer.cache[key]
    outputs = jitted(*given)
    outer.adopt(notes.events, operands, _sources(outer, eqn), number)
    return restore(outputs, operands)


def restore(outputs: Sequence[Any], operands: Sequence[Any]) -> list[Any]:
    """Parameters that leave a body get back the number they have outside."""

    def one(x: Any) -> Any:
        if isinstance(x, Joined):
            return replace(x, pieces=tuple(one(p) for p in x.pieces))
        if not isinstance(x, Tracked):
            return x
        number = x.leaf
        origin = (
            operands[number[0]].pieces[number[1]]
            if isinstance(number, tuple)
            else operands[number]
        )
        picks = origin.picks + x.picks
        return replace(x, leaf=origin.leaf, picks=picks, base=origin.base)

    return [one(x) for x in outputs]


def enter_remat(outer: Body, eqn: Any, operands: list[Any], number: int) -> list[Any]:
    """`jax.checkpoint` with its policy."""
    jaxpr, consts = compat.call_body(eqn)
    notes = Notes()

    def call(*args: Any) -> list[Any]:
        inner = outer.nested()
        out = inner.run(jaxpr, consts, args)
        notes.events = tuple(inner.events)
        return out

    outputs = jax.checkpoint(call, **compat.remat_options(eqn))(
        *outer.renumber(operands)
    )
    outer.adopt(notes.events, operands, _sources(outer, eqn), number)
    return restore(outputs, operands)


@jax.custom_jvp
def inlined(x: Any) -> Any:
    """The output of a custom-derivative function whose body holds a low-bit site."""
    return x


@inlined.defjvp
def _inlined_jvp(primals: Any, tangents: Any) -> Any:
    warnings.warn(
        "a function with a custom derivative holds a quantized parameter; its body is "
        "differentiated instead of its own rule",
        QuantizationWarning,
        stacklevel=2,
    )
    return primals[0], tangents[0]


def enter_custom(outer: Body, eqn: Any, operands: list[Any], number: int) -> list[Any]:
    """A custom-derivative call around a site is inlined; its own rule is lost."""
    jaxpr, consts = compat.call_body(eqn)
    inner = outer.nested()
    outputs = inner.run(jaxpr, consts, outer.renumber(operands))
    outer.adopt(inner.events, operands, _sources(outer, eqn), number)
    low_bit = any(isinstance(x, Tracked) and x.quantized for x in operands)
    if low_bit:
        outputs = [
            inlined(x) if not isinstance(x, (Tracked, Joined)) and _float(x) else x
            for x in outputs
        ]
    return restore(outputs, operands)


def _float(x: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jnp.floating)


def enter_scan(outer: Body, eqn: Any, operands: list[Any], number: int) -> list[Any]:
    """`lax.scan`; a leaf scanned over is sliced child by child.

    A `Stacked` leaf among them makes one scan for each run of equal formats.
    """
    jaxpr, consts = compat.body(eqn.params["jaxpr"])
    n_const, n_carry = compat.scan_groups(eqn)
    split = n_const + n_carry
    fixed = _unchanged(jaxpr, range(n_const, split))

    def keep(i: int, x: Tracked) -> bool:
        if i < n_const:
            return True
        if i < split:
            return i in fixed
        return x.view.first() is not None and _leading(x)

    operands = _plain(outer, eqn, operands, keep)
    given = outer.renumber(operands)
    held = [x if i < n_const or i in fixed else None for i, x in enumerate(given)]
    carry = [given[i] for i in range(n_const, split) if i not in fixed]
    xs = given[split:]
    notes = Notes()
    # A carried value is another one in every step: never the same as one outside.
    names = [
        ("carried" if n_const <= i < split and i not in fixed else "arg", i)
        for i in range(len(given))
    ]

    def body(carry: list[Any], xs: list[Any]) -> tuple[list[Any], list[Any]]:
        moving = iter(carry)
        args = [h if h is not None else next(moving) for h in held[:split]]
        inner = outer.nested()
        every = [*args, *(_slice(x) for x in xs)]
        out = inner.run(jaxpr, consts, every, names)
        notes.events = tuple(inner.events)
        kept = [x for i, x in enumerate(out[:n_carry]) if n_const + i not in fixed]
        leaving = [*kept, *out[n_carry:]]
        flat = inner.as_floats("scan", leaving, "leaves a scan")
        return flat[: len(kept)], flat[len(kept) :]

    length = eqn.params["length"]
    ranges = _runs(xs, length)
    order = reversed(ranges) if eqn.params["reverse"] else ranges
    options = {"reverse": eqn.params["reverse"], "unroll": eqn.params["unroll"]}
    pieces, state, events = {}, carry, []
    for start, stop in order:
        part = [_range(x, start, stop, len(ranges)) for x in xs]
        state, pieces[start] = jax.lax.scan(
            body, state, part, length=stop - start, **options
        )
        events.append(notes.events)
    ys = [pieces[start] for start, _ in ranges]
    outputs = (
        ys[0] if len(ys) == 1 else [jnp.concatenate(column) for column in zip(*ys)]
    )
    outer.adopt(
        _scanned(_merge(events), length, split, operands),
        operands,
        _sources(outer, eqn),
        number,
    )
    moving = iter(state)
    final = [operands[i] if i in fixed else next(moving) for i in range(n_const, split)]
    return [*final, *outputs]


def _unchanged(jaxpr: Any, carried: range) -> set[int]:
    """Carried values that the body returns as they came."""
    pairs = zip(carried, jaxpr.outvars)
    return {i for i, out in pairs if out is jaxpr.invars[i]}


def _leading(x: Tracked) -> bool:
    """Whether the first axis of a quantized leaf is one of layers, not of weights."""
    if not x.quantized:
        return True
    layout = (x.value.parts[0] if isinstance(x.value, Stacked) else x.value).layout
    return x.value.ndim > len(layout.roles)


def _slice(x: Any) -> Any:
    """Inside a scan, the value of a leaf is one layer of it."""
    if not isinstance(x, Tracked):
        return x
    view = x.view.first()
    if view is None:
        raise ValueError("a scanned parameter lost its leading axis")
    return replace(x, view=view)


def _runs(xs: Sequence[Any], length: int) -> list[tuple[int, int]]:
    """The coarsest ranges of layers in which every leaf has one format."""
    cuts = {0, length}
    for x in xs:
        if isinstance(x, Tracked) and isinstance(x.value, Stacked):
            cuts |= {stop for _, stop in x.value.ranges}
    ordered = sorted(cuts)
    return list(pairwise(ordered))


def _range(x: Any, start: int, stop: int, runs: int) -> Any:
    if isinstance(x, Tracked) and isinstance(x.value, Stacked):
        value = x.value.layers(start, stop)
        return replace(x, value=value, view=_shorter(x.view, stop - start))
    if runs == 1:
        return x
    if isinstance(x, Tracked):
        value = jax.tree.map(lambda v: v[start:stop], x.value)
        return replace(x, value=value, view=_shorter(x.view, stop - start))
    return x[start:stop]


def _shorter(view: View, length: int) -> View:
    return replace(view, atoms=(length, *view.atoms[1:]))


def _merge(runs: Sequence[Sequence[Event]]) -> list[Event]:
    """One event per site from the scans of a stacked leaf's runs."""
    merged = []
    for same in zip(*runs):
        ways = dict.fromkeys(e.runs for e in same)
        merged.append(replace(same[0], runs="; ".join(ways)))
    return merged


def _scanned(
    events: Sequence[Event], length: int, split: int, operands: Sequence[Any]
) -> list[Event]:
    """Events of a scan body: leaves that were scanned over are stacked."""
    group = tuple(
        i for i, x in enumerate(operands) if i >= split and isinstance(x, Tracked)
    )

    def one(event: Event) -> Event:
        if event.leaf not in group:
            return event
        stacked, groups = (length, *event.stacked), (group, *event.groups)
        return replace(event, stacked=stacked, groups=groups)

    return [one(e) for e in events]


def enter_cond(outer: Body, eqn: Any, operands: list[Any], number: int) -> list[Any]:
    """`lax.switch`: the branches see the same parameters."""
    index, given = as_array(operands[0]), outer.renumber(operands)[1:]
    notes = [Notes() for _ in eqn.params["branches"]]

    def branch(closed: Any, note: Notes) -> Any:
        jaxpr, consts = compat.body(closed)

        def call(*args: Any) -> list[Any]:
            inner = outer.nested()
            sources = [("arg", i + 1) for i in range(len(args))]
            out = inner.run(jaxpr, consts, args, sources)
            flat = inner.as_floats("cond", out, "leaves a cond")
            note.events = tuple(inner.events)
            return flat

        return call

    calls = [branch(b, n) for b, n in zip(eqn.params["branches"], notes)]
    outputs = jax.lax.switch(index, calls, *given)
    for note in notes:
        outer.adopt(note.events, operands, _sources(outer, eqn), number)
    return list(outputs)


def enter_while(outer: Body, eqn: Any, operands: list[Any], number: int) -> list[Any]:
    """`lax.while_loop`; parameters are constants of the loop."""
    p = eqn.params
    test_jaxpr, test_consts = compat.body(p["cond_jaxpr"])
    jaxpr, consts = compat.body(p["body_jaxpr"])
    n_test, n_body = p["cond_nconsts"], p["body_nconsts"]
    split = n_test + n_body
    carried = range(n_body, len(jaxpr.invars))
    fixed = {i + n_test for i in _unchanged(jaxpr, carried)}
    operands = _plain(outer, eqn, operands, lambda i, _: i < split or i in fixed)
    given = outer.renumber(operands)
    held = given[:split]
    moving = [x for i, x in enumerate(given) if i >= split and i not in fixed]
    notes, tested = Notes(), Notes()
    names = [
        ("carried" if i >= split and i not in fixed else "arg", i)
        for i in range(len(given))
    ]

    def everything(state: Sequence[Any]) -> list[Any]:
        rest = iter(state)
        return [
            x if i in fixed else next(rest)
            for i, x in enumerate(given[split:], start=split)
        ]

    def test(state: list[Any]) -> Any:
        args = [*held[:n_test], *everything(state)]
        where = names[:n_test] + names[split:]
        inner = outer.nested()
        out = inner.run(test_jaxpr, test_consts, args, where)[0]
        tested.events = tuple(inner.events)
        return out

    def body(state: list[Any]) -> list[Any]:
        inner = outer.nested()
        args = [*held[n_test:], *everything(state)]
        out = inner.run(jaxpr, consts, args, names[n_test:])
        notes.events = tuple(inner.events)
        kept = [x for i, x in enumerate(out, start=split) if i not in fixed]
        return inner.as_floats("while", kept, "leaves a loop")

    final = iter(jax.lax.while_loop(test, body, moving))
    outer.adopt(tested.events, operands, _sources(outer, eqn), number)
    outer.adopt(notes.events, operands, _sources(outer, eqn), number)
    return [
        operands[i] if i in fixed else next(final) for i in range(split, len(operands))
    ]


ENTER = {
    "jit": enter_jit,
    "remat": enter_remat,
    "custom": enter_custom,
    "scan": enter_scan,
    "cond": enter_cond,
    "while": enter_while,
    "shard_map": sharded.enter_shard_map,
}
