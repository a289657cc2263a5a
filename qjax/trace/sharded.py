"""`shard_map` with quantized parameters: specs for every child, local static shapes."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
from jax.sharding import PartitionSpec

from qjax.core.carrier import Carrier
from qjax.core.layout import Layout
from qjax.core.qtensor import QTensor, Stacked
from qjax.core.sharding import localize, obstacle, partition_specs
from qjax.trace import compat
from qjax.trace.interpret import Body, Event
from qjax.trace.views import Joined, Tracked, View


def enter_shard_map(
    outer: Body, eqn: Any, operands: list[Any], number: int
) -> list[Any]:
    """A parameter enters as the leaf's spec says; its arrays follow.

    Raises:
        ValueError: a shard would cut a group, a word or a block.
    """
    p = eqn.params
    jaxpr, consts = compat.call_body(eqn)
    mesh, specs = p["mesh"], tuple(p["in_specs"])
    plain: list[Any] = []
    for x, spec in zip(operands, specs):
        reason = _obstacle(x, spec, mesh)
        plain += outer.as_floats("shard_map", [x], reason) if reason else [x]
    given = outer.renumber(plain)
    events: list[Any] = []

    def call(*args: Any) -> tuple[Any, ...]:
        inner = outer.nested()
        local = [_local(x, spec, mesh) for x, spec in zip(args, specs)]
        out = inner.run(jaxpr, consts, local)
        flat = inner.as_floats("shard_map", out, "leaves shard_map")
        events[:] = inner.events
        return tuple(flat)

    mapped = jax.shard_map(
        call,
        mesh=mesh,
        in_specs=tuple(_specs(x, spec, mesh) for x, spec in zip(given, specs)),
        out_specs=tuple(p["out_specs"]),
        axis_names=p["newly_manual_axes"],
        check_vma=p["check_vma"],
    )
    outputs = mapped(*given)
    sources: Sequence[Any] = [outer.source(v) for v in eqn.invars]
    outer.adopt([_whole(e, plain) for e in events], plain, sources, number)
    return list(outputs)


def _whole(event: Event, operands: Sequence[Any]) -> Event:
    """A site seen by one shard, with the sizes of the whole leaf."""
    if event.layout is None or event.leaf is None:
        return event
    roles = event.layout.roles
    shape = operands[event.leaf].shape[-len(roles) :]
    sizes = tuple(0 if r == "b" else n for r, n in zip(roles, shape))
    lead = tuple(n for r, n in zip(roles, shape) if r == "b")
    return replace(event, layout=Layout(roles, sizes), lead=lead)


def _obstacle(x: Any, spec: PartitionSpec, mesh: Any) -> str:
    """Why a value enters as a float array; empty if it may stay what it is."""
    if isinstance(x, Joined):
        return "joined before it enters shard_map"
    if not isinstance(x, Tracked):
        return ""
    if not x.view.identity:
        return "reshaped before it enters shard_map"
    if isinstance(x.value, Carrier):
        return "its parts have no sharding rule"
    if isinstance(x.value, Stacked):
        return "layers of several formats enter shard_map"
    return obstacle(x.value, spec, mesh) if isinstance(x.value, QTensor) else ""


def _specs(x: Any, spec: PartitionSpec, mesh: Any) -> Any:
    if not isinstance(x, Tracked):
        return spec
    if not x.quantized:
        return replace(x, value=spec)
    specs = partition_specs(x.value, spec, mesh)
    leaves = jax.tree.leaves(specs, is_leaf=lambda s: isinstance(s, PartitionSpec))
    return jax.tree.unflatten(jax.tree.structure(x), leaves)


def _local(x: Any, spec: PartitionSpec, mesh: Any) -> Any:
    if not isinstance(x, Tracked):
        return x
    value = localize(x.value, spec, mesh) if x.quantized else x.value
    return replace(x, value=value, view=View.of(tuple(value.shape)))
