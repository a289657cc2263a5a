"""`finalize`: from trained parameters to the QTensors that are served."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from qjax.core.qtensor import QTensor, SiteActs, is_quantized
from qjax.trace.paths import flatten_with_paths
from qjax.train.joined import shared
from qjax.train.observed import Observed
from qjax.train.quantizers import Trained, site_acts, stored_weights
from qjax.train.state import Plan, QState

_stored = jax.jit(stored_weights, static_argnums=0)


def finalize(params: Any, qstate: QState) -> Any:
    """The trained parameters as QTensors, for `qjax.apply(f)`.

    Args:
      params: as trained.
      qstate: as trained.

    Returns:
      The tree, with a `QTensor` for each leaf that was trained quantized.

    Raises:
      ValueError: a leaf is missing, or an activation is still in float: nothing was
        observed, or its start has not been reached.
    """
    leaves = dict(flatten_with_paths(params))
    missing = [p.path for p in qstate.plans if p.path not in leaves]
    if missing:
        raise ValueError(
            f"params has no {missing[0]}, which was trained quantized; give the tree "
            "that fake_quantize was given, as trained"
        )
    common = shared(qstate.plans, leaves)
    for p in qstate.plans:
        leaves[p.path] = _finished(p, leaves[p.path], qstate, common[p.path])
    treedef = jax.tree.structure(params, is_leaf=is_quantized)
    return jax.tree.unflatten(treedef, leaves.values())


def _finished(plan: Plan, leaf: Any, qstate: QState, common: Trained) -> QTensor:
    trained = qstate.trained[plan.path]["weights"] | common
    part = _stored(plan.step.weights, plan.layout.to_matrix(leaf), trained)
    if plan.step.activations is None:
        return QTensor.of(part, plan.layout, plan.dtype)
    acts = tuple(
        _record(plan, qstate, number, kind) for number, kind in enumerate(plan.kinds)
    )
    return QTensor.of(part, plan.layout, plan.dtype, acts)


def _record(plan: Plan, qstate: QState, number: int, kind: str) -> SiteActs:
    """The activation record of one site."""
    inputs = plan.step.activations
    assert inputs is not None
    if kind == "embedding":
        return SiteActs()
    known = qstate.trained[plan.path]["inputs"][number]
    if isinstance(inputs, Observed):
        known = qstate.observed["ranges"][plan.path][number]
        step = qstate.observed["step"]
        if not bool(jnp.all(inputs.live(known, step))):
            raise ValueError(
                f"the input of {plan.path} is still in float after {int(step)} steps "
                f"(it has seen {int(known['batches'].min())} batches, and "
                f"Observed.start is {inputs.start}); train on before finalize"
            )
    acts = site_acts(inputs, known)
    lead = plan.lead(kind)

    def whole(x: Any) -> Any:
        return None if x is None else jnp.broadcast_to(x, (*lead, *x.shape[-2:]))

    return replace(acts, scale=whole(acts.scale), zero=whole(acts.zero))
