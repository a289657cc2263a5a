"""A traced function with carriers in the place of leaves, and what its sites saw."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.core.carrier import Carrier
from qjax.core.qtensor import is_quantized
from qjax.solving import site_key
from qjax.trace.apply import warn_of
from qjax.trace.control import interpreter
from qjax.trace.interpret import Event, Rule
from qjax.trace.program import trace
from qjax.train.quantizers import Seen
from qjax.train.state import Plan

Observations = dict[str, list[Seen | None]]
"""By path, what was seen at each site."""


def check_key(owner: str, key: Any) -> None:
    """Refuse what is no random key.

    Raises:
      TypeError: naming the owner and what was given.
    """
    dtype = getattr(key, "dtype", None)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if not typed and not (dtype == jnp.uint32 and jnp.ndim(key) == 1):
        raise TypeError(
            f"{owner} draws random numbers from key, which must be a key such as "
            f"jax.random.key(0), got {key!r}"
        )


def layer_keys(key: Any, path: str, layers: tuple[int, ...]) -> Any:
    """A leaf's own random keys, one for each of its layers."""
    own = site_key(key, path)
    return jax.random.split(own, layers) if layers else own


def run(
    f: Callable[..., Any],
    params: Any,
    makes: Mapping[str, Callable[[Any], Carrier]],
    rule: Rule,
    inputs: Sequence[Any],
    options: dict[str, Any],
) -> tuple[Any, list[tuple[str, Event]]]:
    """`f` with carriers in the place of leaves, each made from the leaf at its path.

    Returns:
      What `f` returns, and every use of a leaf with the leaf's path.
    """
    program = trace(f, params, inputs, options)
    leaves = [
        makes[path](leaf) if path in makes else leaf
        for path, leaf in zip(program.paths, program.leaves)
    ]
    body = interpreter(rule)
    operands = replace(program, leaves=tuple(leaves)).operands(
        track=lambda x: is_quantized(x) or isinstance(x, Carrier)
    )
    outputs = body.run(program.jaxpr, program.consts, operands)
    flat = body.as_floats("return", outputs, "returned by the function")
    warn_of(program, body.events)
    events = [(program.paths[e.leaf], e) for e in body.events if e.leaf is not None]
    return jax.tree.unflatten(program.out_tree, flat), events


def observations(
    plans: Sequence[Plan], events: Sequence[tuple[str, Event]]
) -> Observations:
    """What the sites of planned leaves saw.

    Raises:
      ValueError: the input of a planned leaf could not be coded or observed.
    """
    _check_reached(plans, events)
    return {p.path: _gathered(p, [e for q, e in events if q == p.path]) for p in plans}


def _check_reached(plans: Sequence[Plan], events: Sequence[tuple[str, Event]]) -> None:
    coded = {p.path for p in plans if p.step.activations is not None}
    for path, event in events:
        entered = event.kind == "other" and event.primitive == "shard_map"
        if entered and path in coded:
            raise ValueError(
                f"{path} is read inside shard_map, where its input cannot be quantized "
                "in training; leave it out with ignore, or take activations=None"
            )


def _gathered(plan: Plan, events: Sequence[Event]) -> list[Seen | None]:
    """What was seen at each site of a leaf, in all of its layers."""
    total: list[Seen | None] = [None] * len(plan.kinds)
    for event in events:
        if event.seen is None:
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
