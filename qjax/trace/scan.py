"""Re-emission of `lax.scan`, layer by layer of the leaves that it scans over."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp

from qjax.core.qtensor import Stacked
from qjax.trace import compat
from qjax.trace.interpret import Body, Event
from qjax.trace.nested import Notes, sources_of, unchanged, without
from qjax.trace.views import Tracked, View


def enter_scan(outer: Body, eqn: Any, operands: list[Any], number: int) -> list[Any]:
    """`lax.scan`; a leaf scanned over is sliced child by child.

    A `Stacked` leaf among them makes one scan for each run of equal formats.
    """
    jaxpr, consts = compat.body(eqn.params["jaxpr"])
    n_const, n_carry = compat.scan_groups(eqn)
    split = n_const + n_carry
    fixed = unchanged(jaxpr, range(n_const, split))

    def keep(i: int, x: Tracked) -> bool:
        if i < n_const:
            return True
        if i < split:
            return i in fixed
        return x.view.first() is not None and _leading(x)

    operands = without(outer, eqn, operands, keep)
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

    def body(carry: list[Any], xs: list[Any]) -> tuple[list[Any], Any]:
        moving = iter(carry)
        args = [h if h is not None else next(moving) for h in held[:split]]
        inner = outer.nested()
        every = [*args, *(_slice(x) for x in xs)]
        out = inner.run(jaxpr, consts, every, names)
        seen = notes.keep(inner.events)
        kept = [x for i, x in enumerate(out[:n_carry]) if n_const + i not in fixed]
        leaving = [*kept, *out[n_carry:]]
        flat = inner.as_floats("scan", leaving, "leaves a scan")
        return flat[: len(kept)], (flat[len(kept) :], seen)

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
    outputs, seen = (
        ys[0] if len(ys) == 1 else jax.tree.map(lambda *y: jnp.concatenate(y), *ys)
    )
    merged = [replace(e, seen=s) for e, s in zip(_merge(events), seen)]
    outer.adopt(
        _scanned(merged, length, split, operands),
        operands,
        sources_of(outer, eqn),
        number,
    )
    moving = iter(state)
    final = [operands[i] if i in fixed else next(moving) for i in range(n_const, split)]
    return [*final, *outputs]


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
    """Events of a scan body: leaves that were scanned over are stacked.

    What was observed at the site of another leaf is taken together over all steps.
    """
    group = tuple(
        i for i, x in enumerate(operands) if i >= split and isinstance(x, Tracked)
    )

    def one(event: Event) -> Event:
        if event.leaf not in group:
            seen = None if event.seen is None else event.seen.over_steps()
            return replace(event, seen=seen)
        stacked, groups = (length, *event.stacked), (group, *event.groups)
        return replace(event, stacked=stacked, groups=groups)

    return [one(e) for e in events]
