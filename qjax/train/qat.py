"""`fake_quantize`: a function, unchanged, trained as it will be served."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial, wraps
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from qjax.core.formats import NVFP4
from qjax.methods.rtn import RTN
from qjax.planning import plan
from qjax.solving import refuse_non_finite
from qjax.trace.batches import as_batch, as_batches
from qjax.trace.paths import flatten_with_paths
from qjax.trace.program import require_loaded
from qjax.trace.sites import Sites, sites
from qjax.train.fake import FakeQuantized, fake_rule
from qjax.train.joined import joined, shared
from qjax.train.observed import Observed
from qjax.train.quantizers import Seen, Trained
from qjax.train.running import Observations, layer_keys, observations, run
from qjax.train.state import QAT, Plan, QState
from qjax.train.straight_through import StraightThrough


def fake_quantize(
    f: Callable[..., Any],
    params: Any,
    recipe: Any,
    calibration: Iterable[Any] | None = None,
    *,
    example: Any = None,
) -> tuple[Callable[..., Any], QState]:
    """`f` with quantization in its forward pass, to be trained.

    `f_qat(params, qstate, *inputs, key=None) -> (out, qstate)` is an ordinary JAX
    function: jit, grad and shard it. It is differentiable in `params` and
    `qstate.trained` (`dataclasses.replace(qstate, trained=...)`); the state that it
    returns has the next `observed`, and `out` is that of the ranges it was given. Every
    value is the one that `apply(f)` gives on `finalize(params, qstate)`; with a `key`
    methods that round at random do so.

    Args:
      f: `f(params, *inputs)`; `quantize_kv(f, 4)` for keys and values in 4 bits too.
      params: float leaves in memory; leaves that are already quantized stay so.
      recipe: a `QAT` step or a tuple of them, the first that matches takes a site;
        `RTN` stands for the straight-through estimator of its formats.
      calibration: batches, each a tuple `inputs`. Learned ranges of activations start
        from what these see, in float.
      example: one batch to trace with, in place of `calibration`; its arrays may be
        `jax.ShapeDtypeStruct`.

    Returns:
      `f_qat`, and the state before the first step.

    Raises:
      ValueError: a pattern matches nothing, layers of one stacked leaf have different
        steps, a method must see data and there is none, weights or what is seen are not
        finite, or `RTN` says of activations what training does not do.
      TypeError: a step is no `QAT`, a batch is no tuple, or a leaf is still on disk.
    """
    require_loaded(params)
    steps = tuple(
        map(_as_step, recipe if isinstance(recipe, (tuple, list)) else [recipe])
    )
    batches = as_batches(calibration)
    first = batches[0] if batches else example
    if first is None:
        raise ValueError(
            "fake_quantize traces f once: give calibration=[(inputs, ...)] or "
            "example=(inputs, ...)"
        )
    first = as_batch(first, "example")
    leaves = dict(flatten_with_paths(params))
    plans = _plans(steps, sites(f, params, *first), leaves)
    seen = _watch(f, params, plans, batches)
    trained = {p.path: _initial(p, leaves[p.path], seen[p.path]) for p in plans}
    ranges = {p.path: _fresh(p) for p in plans if _observes(p)}
    observed = {"step": jnp.zeros((), jnp.int32), "ranges": ranges}
    return _transformed(f), QState(trained, observed, plans)


def _as_step(step: Any) -> QAT:
    if isinstance(step, QAT):
        return step
    if not isinstance(step, RTN):
        raise TypeError(
            f"a recipe for training holds QAT(...) or RTN(...) steps, got {step!r}"
        )
    _check_trained(step)
    own, inputs = step.activation, None
    if own is not None:
        kind = StraightThrough if own.dynamic else Observed
        inputs = kind(own.format)
    weights = StraightThrough(step.format, step.search, step.rounding)
    return QAT(weights, inputs, step.targets, step.ignore)


def _check_trained(step: RTN) -> None:
    """Refuse what a step says of activations and training does otherwise."""
    own = step.activation
    if step.calibrator is not None:
        raise ValueError(
            f"RTN.calibrator is {step.calibrator!r}, and training observes a moving "
            "average of the ranges; leave it out, or say how with QAT and Observed"
        )
    if own is None:
        return
    if own.outliers is not None:
        raise ValueError(
            f"RTN.activations has outliers={own.outliers!r}, and training codes all "
            "features alike; take activations without outliers"
        )
    if isinstance(own.format, NVFP4) and not own.dynamic:
        raise ValueError(
            "the activations of RTN are nvfp4 with a static global scale, which "
            "training does not observe; take one of each batch, "
            "QAT(StraightThrough(NVFP4()), StraightThrough(NVFP4()))"
        )


def _plans(
    steps: Sequence[QAT], found: Sites, leaves: dict[str, Any]
) -> tuple[Plan, ...]:
    def one(job: Any) -> Plan:
        _check_finite(job.names, leaves[job.path])
        if len(set(job.steps)) > 1:
            raise ValueError(
                f"{job.path} is one stacked leaf; all its layers are trained by one "
                "step, or do not stack the layers"
            )
        uses = found.of(job.path)
        kinds = ["embedding"] * (1 + max(use.index for use in uses))
        for use in uses:
            kinds[use.index] = use.kind
        step = steps[job.steps[0]]
        dtype = jnp.dtype(job.dtype)
        return Plan(job.path, job.layout, job.shape, dtype, step, tuple(kinds), ())

    jobs = plan(steps, found, leaves)
    return joined([one(job) for job in jobs], jobs)


def _check_finite(names: tuple[str, ...], leaf: Any) -> None:
    if isinstance(leaf, Tracer):
        return  # has no values yet
    with jax.ensure_compile_time_eval():  # what is traced may hold known weights
        bad = np.asarray(_not_finite(jnp.asarray(leaf), len(names)))
    refuse_non_finite(names, bad, leaf.size // len(names), "train finite weights")


@partial(jax.jit, static_argnums=1)
def _not_finite(leaf: jax.Array, layers: int) -> jax.Array:
    return jnp.sum(~jnp.isfinite(leaf.reshape(layers, -1)), axis=1)


def _observes(plan: Plan) -> bool:
    return plan.step.activations is not None and plan.step.activations.observes


def _initial(plan: Plan, leaf: Any, seen: Sequence[Seen | None]) -> dict[str, Any]:
    """What is learned for a leaf, before the first step."""
    matrix = plan.layout.to_matrix(jnp.asarray(leaf))
    trained = {"weights": plan.step.weights.init_weights(matrix), "inputs": ()}
    inputs = plan.step.activations
    if inputs is None:
        return trained

    def site(kind: str, seen: Seen | None) -> dict[str, Any]:
        if kind == "embedding":
            return {}
        if inputs.learns and seen is None:
            raise ValueError(
                f"{type(inputs).__name__} starts from the activations of {plan.path}, "
                "and none was seen: give calibration=[(inputs, ...), ...]"
            )
        if seen is not None and not bool(jnp.all(jnp.isfinite(seen.magnitude))):
            raise ValueError(
                f"the input of {plan.path} is NaN or Inf in a calibration batch; "
                f"{type(inputs).__name__} starts from finite activations"
            )
        return inputs.init_inputs(seen, plan.lead(kind))

    return {**trained, "inputs": tuple(map(site, plan.kinds, seen))}


def _fresh(plan: Plan) -> tuple[Any, ...]:
    inputs = plan.step.activations
    assert isinstance(inputs, Observed)
    return tuple(inputs.fresh(plan.lead(kind), plan.blocks()) for kind in plan.kinds)


def _transformed(f: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(f)
    def f_qat(
        params: Any, qstate: QState, *inputs: Any, key: Any = None, **options: Any
    ) -> tuple[Any, QState]:
        common = shared(qstate.plans, dict(flatten_with_paths(params)))
        makes = {
            p.path: partial(_carrier, p, qstate, key, common[p.path])
            for p in qstate.plans
        }
        out, events = run(f, params, makes, fake_rule, inputs, options)
        seen = observations(qstate.plans, events)
        return out, replace(qstate, observed=_moved(qstate, seen))

    return f_qat


def _carrier(
    plan: Plan, qstate: QState, key: Any, common: Trained, leaf: Any
) -> FakeQuantized:
    trained, step = qstate.trained[plan.path], qstate.observed["step"]
    acts = trained["inputs"]
    inputs = plan.step.activations
    if isinstance(inputs, Observed):
        ranges = qstate.observed["ranges"][plan.path]
        acts = tuple({**each, "live": inputs.live(each, step)} for each in ranges)
    keys = None
    random = plan.step.weights.rounding == "stochastic" or plan.step.gradients
    if key is not None and random:
        keys = layer_keys(key, plan.path, plan.layers)
    return FakeQuantized(
        leaf, trained["weights"] | common, acts, keys, plan.layout, plan.dtype,
        plan.step.weights, inputs, gradients=plan.step.gradients,
    )  # fmt: skip


def _watched(plan: Plan, leaf: Any) -> FakeQuantized:
    acts = ({},) * len(plan.kinds)
    return FakeQuantized(
        leaf, {}, acts, None, plan.layout, plan.dtype, plan.step.weights,
        plan.step.activations, watching=True,
    )  # fmt: skip


def _watch(
    f: Any, params: Any, plans: Sequence[Plan], batches: Sequence[tuple[Any, ...]]
) -> Observations:
    """What the sites with a learned range see in float."""
    total: Observations = {p.path: [None] * len(p.kinds) for p in plans}
    learning = tuple(
        p for p in plans if p.step.activations is not None and p.step.activations.learns
    )
    leaves = jax.tree.leaves(batches)
    if not learning or any(isinstance(x, jax.ShapeDtypeStruct) for x in leaves):
        return total

    @jax.jit
    def see(params: Any, batch: tuple[Any, ...]) -> Observations:
        makes = {p.path: partial(_watched, p) for p in learning}
        return observations(learning, run(f, params, makes, fake_rule, batch, {})[1])

    for batch in batches:
        for path, new in see(params, batch).items():
            old = total[path]
            total[path] = [
                b if a is None else a if b is None else a.merge(b)
                for a, b in zip(old, new)
            ]
    return total


def _moved(qstate: QState, seen: Observations) -> dict[str, Any]:
    """What is observed after a call."""
    step, ranges = qstate.observed["step"], {}
    for p in qstate.plans:
        if not _observes(p):
            continue
        inputs = p.step.activations
        assert isinstance(inputs, Observed)
        ranges[p.path] = tuple(
            old if new is None else inputs.update(old, new, step)
            for old, new in zip(qstate.observed["ranges"][p.path], seen[p.path])
        )
    return {"step": step + 1, "ranges": ranges}
