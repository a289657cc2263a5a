"""Errors that candidate scales of a group of sites would make in what they feed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from qjax.core.coded import fake_quantize
from qjax.trace import compat
from qjax.trace.blocks import leaves_of
from qjax.trace.segments import Segment, cut, evaluate
from qjax.trace.stream import LeafKey
from qjax.trace.tape import Tape
from qjax.trace.views import LAYOUT


def module_of(names: Sequence[str]) -> str:
    """The path that holds all sites: of one site its own linear.

    >>> module_of(["layers/0/attn/q/kernel", "layers/0/attn/k/kernel"])
    'layers/0/attn/'
    """
    split = [name.split("/")[:-1] for name in names]
    shared = []
    for column in zip(*split):
        if len(set(column)) > 1:
            break
        shared.append(column[0])
    return "/".join(shared) + "/"


def region(
    tape: Tape,
    name: Callable[[LeafKey], str],
    start: int,
    meetings: Sequence[Any],
    module: bool,
) -> Segment:
    """From the sites to the last operation of the module that holds them."""
    prefix = module_of([name((m.weight.leaf, m.weight.index)) for m in meetings])
    stop = 1 + max(
        place
        for place, op in enumerate(tape.ops)
        if op in meetings
        or (module and any(name(k).startswith(prefix) for k in leaves_of(tape, op)))
    )
    made = {out for op in tape.ops[start:stop] for out in op.outs}
    later = {x for op in tape.ops[stop:] for x in op.ins if isinstance(x, int)}
    later |= {x for x in tape.outputs if isinstance(x, int)}
    wanted = [x for x in sorted(made) if x in later]
    floats = [x for x in wanted if jnp.issubdtype(tape.avals[x].dtype, jnp.floating)]
    return cut(tape, start, stop, floats)


def outputs_only(tape: Tape, segment: Segment, meetings: Sequence[Any]) -> bool:
    """Whether the outputs whose error counts are those of the sites themselves.

    The error is then known from `E[x x^T]`, without running anything again.
    """

    def passes(op: Any) -> bool:
        bias = any(x in tape.weights for x in op.ins if isinstance(x, int))
        kind = compat.kind(op.eqn)
        return op in meetings or kind in LAYOUT or (kind == "add" and bias)

    return all(passes(op) for op in segment.ops)


@partial(jax.jit, static_argnums=0)
def linear_errors(formats: Any, scales: Any, ws: Any, h: Any) -> Any:
    """Squared error of the sites' outputs for every candidate: `tr(D^T h D)`."""

    def one(s: Any) -> Any:
        deltas = [
            _rounded(w, s, f).astype(jnp.float32) - w.astype(jnp.float32)
            for w, f in zip(ws, formats)
        ]
        moved = [jnp.matmul(h, d, precision="highest") for d in deltas]
        return sum(jnp.sum(d * m) for d, m in zip(deltas, moved))

    return jax.lax.map(one, scales)


def _rounded(w: Any, s: Any, format: Any) -> Any:
    """`Q(diag(s) w) / s`."""
    scaled = (w.astype(jnp.float32) * s[:, None]).astype(w.dtype)
    return fake_quantize(scaled, format) / s[:, None].astype(w.dtype)


@dataclass(frozen=True)
class Search:
    """A search as a static argument: equal for groups of equal structure."""

    key: Any
    formats: tuple[Any, ...]
    views: tuple[Any, ...]
    piece: tuple[Any, Segment, Sequence[Any]] = field(compare=False, repr=False)


@partial(jax.jit, static_argnums=0)
def module_errors(
    search: Search,
    scales: Any,
    ws: Sequence[Any],
    leaves: Sequence[Any],
    constants: Sequence[Any],
    ins: Sequence[Any],
) -> Any:
    """Squared error of the segment's outputs for every candidate scale."""
    (tape, segment, meetings), formats = search.piece, search.formats
    places = [segment.leaves.index((m.weight.leaf, m.weight.index)) for m in meetings]

    def outputs(given: Sequence[Any]) -> list[Any]:
        every = list(leaves)
        for place, meeting, w in zip(places, meetings, given):
            leaf = meeting.call.layout.from_matrix(w)
            every[place] = leaf.astype(leaves[place].dtype)
        return evaluate(tape, segment, every, constants, ins)

    exact = outputs(ws)

    def one(s: Any) -> Any:
        rounded = [_rounded(w, s, f) for w, f in zip(ws, formats)]
        pairs = zip(outputs(rounded), exact)
        deltas = [a.astype(jnp.float32) - b.astype(jnp.float32) for a, b in pairs]
        return sum(jnp.sum(jnp.square(d)) for d in deltas)

    return jax.lax.map(one, scales)
