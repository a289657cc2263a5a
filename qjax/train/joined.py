"""What leaves with one input share while they are trained: NVFP4's second scale.

Servers run them as one linear, which has one (`qjax/io/fused.py`), and so they are
trained.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp

from qjax.core.layout import Layout
from qjax.core.sweep import second_scale
from qjax.solving import Job
from qjax.train.quantizers import Trained, WeightQuantizer
from qjax.train.state import Plan


def joined(plans: Sequence[Plan], jobs: Sequence[Job]) -> tuple[Plan, ...]:
    """The plans, those of leaves that one step takes and with one input together."""
    groups: dict[Any, list[str]] = {}
    keys = []
    for plan, job in zip(plans, jobs, strict=True):
        lead = plan.shape[: len(plan.layers)], job.experts
        keys.append((job.inputs, plan.step, plan.layout.K, plan.dtype, lead))
        groups.setdefault(keys[-1], []).append(plan.path)
    return tuple(
        replace(plan, together=tuple(groups[key])) for plan, key in zip(plans, keys)
    )


def shared(plans: Sequence[Plan], leaves: Mapping[str, Any]) -> dict[str, Trained]:
    """By path, what the leaves of a group share: the largest of what each has."""
    own = {
        p.path: _own(p.step.weights, p.layout, leaves[p.path])
        for p in plans
        if second_scale(p.step.weights.weight_format)
    }

    def largest(*each: Any) -> Any:
        return reduce(jnp.maximum, each)

    return {
        p.path: jax.tree.map(largest, *(own[q] for q in p.together))
        if p.path in own
        else {}
        for p in plans
    }


@partial(jax.jit, static_argnums=(0, 1))
def _own(method: WeightQuantizer, layout: Layout, leaf: Any) -> Trained:
    w = layout.to_matrix(jax.lax.stop_gradient(leaf))
    return method.shared(w.astype(jnp.float32))
