"""A traced function with carriers in the place of leaves, and what its sites saw."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.core.qtensor import is_quantized
from qjax.trace.apply import warn_of
from qjax.trace.control import interpreter
from qjax.trace.interpret import Event
from qjax.trace.program import Program, trace
from qjax.train.fake import FakeQuantized, fake_rule
from qjax.train.quantizers import Seen
from qjax.train.state import Plan

Observations = dict[str, list[Seen | None]]
"""By path, what was seen at each site."""


def run(
    f: Any,
    params: Any,
    plans: Sequence[Plan],
    make: Callable[[Plan, Any], FakeQuantized],
    inputs: Sequence[Any],
    options: dict[str, Any],
) -> tuple[Any, Observations]:
    """`f` with carriers in the place of the planned leaves."""
    program = trace(f, params, inputs, options)
    number = {path: i for i, path in enumerate(program.paths)}
    leaves = list(program.leaves)
    for p in plans:
        leaves[number[p.path]] = make(p, leaves[number[p.path]])
    with_carriers = replace(program, leaves=tuple(leaves))
    body = interpreter(fake_rule)
    operands = with_carriers.operands(
        track=lambda x: is_quantized(x) or isinstance(x, FakeQuantized)
    )
    outputs = body.run(program.jaxpr, program.consts, operands)
    flat = body.as_floats("return", outputs, "returned by the function")
    warn_of(program, body.events)
    _check_reached(program, plans, body.events)
    seen = {p.path: _gathered(p, number[p.path], body.events) for p in plans}
    return jax.tree.unflatten(program.out_tree, flat), seen


def _check_reached(
    program: Program, plans: Sequence[Plan], events: Sequence[Event]
) -> None:
    """Every planned activation is one that the interpreter comes to."""
    coded = {p.path for p in plans if p.step.activations is not None}
    for event in events:
        entered = event.kind == "other" and event.primitive == "shard_map"
        if entered and program.paths[event.leaf] in coded:
            raise ValueError(
                f"{program.paths[event.leaf]} is read inside shard_map, where its "
                "input cannot be quantized in training; leave it out with ignore, or "
                "take activations=None"
            )


def _gathered(plan: Plan, leaf: int, events: Sequence[Event]) -> list[Seen | None]:
    """What was seen at each site of a leaf, in all of its layers."""
    total: list[Seen | None] = [None] * len(plan.kinds)
    for event in events:
        if event.leaf != leaf or event.seen is None:
            continue
        new, old = event.seen, total[event.index]
        if event.picks:
            new = _placed(plan, event)
        total[event.index] = new if old is None else old.merge(new)
    return total


def _placed(plan: Plan, event: Event) -> Seen:
    """What one layer of an indexed leaf saw, at its place among the layers."""
    index = tuple(number for _, number in event.picks)
    if None in index or event.stacked:
        raise ValueError(
            f"{plan.path} is indexed by a number known only at run time, so that the "
            "range of its input cannot be observed layer by layer; take a range that "
            "is dynamic or learned from a given start (PACT), or scan over the leaf"
        )
    empty = Seen(np.inf, -np.inf, 0.0, 0.0)
    lead = tuple(size for size, _ in event.picks)

    def place(value: Any, start: float) -> Any:
        whole = jnp.full((*lead, *value.shape), start, value.dtype)
        return whole.at[index].set(value)

    return jax.tree.map(place, event.seen, empty)
