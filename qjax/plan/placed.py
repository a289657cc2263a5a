"""`qjax.apply` on a mesh: the results of quantized products are cut as their weights.

Without it the partitioner may cut activations along features that it was not asked for,
and then sends weights between devices.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qjax.core.layout import Layout
from qjax.core.qtensor import Stacked, is_quantized
from qjax.ops import Target
from qjax.trace.apply import evaluated, low_bit
from qjax.trace.control import interpreter
from qjax.trace.program import trace


@dataclass(frozen=True)
class Cut(Layout):
    """A leaf's layout that also says how the results of its products are cut.

    Bodies of loops see leaves without their paths, so that the leaf itself must say it.
    """

    last: Any = None


def cut(q: Any, spec: PartitionSpec) -> Any:
    """The leaf, with results cut along their last axis as it is itself."""
    if isinstance(q, Stacked) or not tuple(spec):
        return q
    own = q.layout
    return replace(q, layout=Cut(own.roles, own.sizes, tuple(spec)[-1]))


def apply_placed(f: Callable[..., Any], target: Target, mesh: Mesh) -> Any:
    """`qjax.apply(f, target=target)` for leaves that `cut` made, on `mesh`.

    A product whose outputs are cut gives a result cut along its last axis; one whose
    inputs are cut ends in a sum that is whole on every device.
    """

    def applied(params: Any, *inputs: Any) -> Any:
        leaves = jax.tree.leaves(params, is_leaf=is_quantized)
        if not any(map(is_quantized, leaves)):
            return f(params, *inputs)
        program = trace(f, params, inputs)
        rule = partial(_placed, target=target, mesh=mesh)
        return evaluated(program, interpreter(rule))

    return applied


def _placed(
    eqn: Any,
    call: Any,
    weight: Any,
    operands: list[Any],
    site: int,
    *,
    target: Target,
    mesh: Mesh,
) -> tuple[Any, str]:
    out, runs = low_bit(eqn, call, weight, operands, site, target=target)
    layout = weight.value.layout if weight.quantized else None
    if out is None or call.kind != "dot" or not isinstance(layout, Cut):
        return out, runs
    where = PartitionSpec(*(None,) * (out.ndim - 1), layout.last)
    return jax.lax.with_sharding_constraint(out, NamedSharding(mesh, where)), runs
