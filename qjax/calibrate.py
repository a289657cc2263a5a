"""The passes of a recipe that needs data, in order: transform, quantize and repair."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from qjax.core.qtensor import is_quantized
from qjax.leaves import Leaves
from qjax.observe import namer
from qjax.recipes import kind_of, wanted_names
from qjax.report import Report, TransformReport
from qjax.solving import Job, Pieces
from qjax.streaming import Options, Pass
from qjax.trace.program import Program, is_arraylike, trace
from qjax.trace.sites import Sites
from qjax.trace.stream import Lane, lanes_of
from qjax.transforming import TransformPass


@dataclass(frozen=True)
class Plan:
    """A recipe on a function.

    Attributes:
      f, params: the function and its float parameters.
      found: its sites.
      jobs: the leaves to quantize, with the quantizing step of each layer.
      steps: the recipe's steps, in order.
      options: of the passes.
    """

    f: Callable[..., Any]
    params: Any
    found: Sites
    jobs: Sequence[Job]
    steps: Sequence[Any]
    options: Options


def calibrate(
    plan: Plan,
    batches: Sequence[tuple[Any, ...]],
    advance: Callable[[int], None],
    place: Callable[[Job, Pieces], None],
    values: dict[str, Any],
) -> Report:
    """Run the passes; `place` takes each finished leaf.

    Leaves that were not quantized but into which a transform was folded are replaced in
    `values`, by path.
    """

    def traced(batch: Any) -> Program:
        return trace(plan.f, plan.params, batch)

    placement, mask_fn = plan.options.placement, plan.options.mask_fn
    gathered = placement.gathered(batches)
    batches = [batch for batch, _ in gathered]
    lanes = lanes_of(traced, batches)
    for lane in lanes:
        for number, value in lane.tape.constants.items():
            lane.tape.constants[number] = placement.whole(value)
    arrays = [
        [placement.batch(x, joined) for x in jax.tree.leaves(b) if is_arraylike(x)]
        for b, joined in gathered
    ]
    masks = [None if mask_fn is None else mask_fn(*batch) for batch in batches]
    check_masks(masks, lanes)
    leaves = Leaves(lanes[0].program.leaves, placement=placement)
    quantizers = [s for s in plan.steps if kind_of(s) == "quantize"]
    repairs, transforms = (_by_name(plan, kind) for kind in ("repair", "transform"))
    rows: list[TransformReport] = []
    name = namer(plan.found, lanes[0].program)
    if transforms:
        formats = {
            name: quantizers[step].format
            for job in plan.jobs
            for name, step in zip(job.names, job.steps)
            if step is not None
        }
        moving = TransformPass(lanes, transforms, formats, name, leaves, plan.options)
        moving.run(arrays, masks)
        rows = moving.reports
    given = (plan.jobs, quantizers, repairs, leaves, plan.options, advance, name)
    run = Pass(lanes, *given)
    run.run(arrays, masks)
    run.stream.solved.clear()
    for job in plan.jobs:
        place(job, run.pieces.pop(job.path))
    _put_edited(lanes[0].program, leaves, values)
    return Report((), (), tuple(run.reports), tuple(rows))


def check_masks(masks: Sequence[Any], lanes: Sequence[Lane]) -> None:
    """Refuse a mask that has a weight for the tokens of no site.

    Raises:
        ValueError: naming the batch.
    """
    dots = [op for lane in lanes for _, op in lane.meetings if op.call.kind == "dot"]
    tokens = sorted({op.call.M for op in dots})
    for number, mask in enumerate(masks):
        if mask is not None and tokens and mask.size not in tokens:
            raise ValueError(
                f"the mask of batch {number} has shape {mask.shape}, but the sites see "
                f"{' or '.join(map(str, tokens))} tokens; mask_fn must give each token "
                "of a batch one weight"
            )


def _by_name(plan: Plan, kind: str) -> dict[str, list[Any]]:
    """The steps of a kind, by the name of each site that they take."""
    taken: dict[str, list[Any]] = {}
    for step in plan.steps:
        if kind_of(step) == kind:
            for name in wanted_names(step, plan.jobs):
                taken.setdefault(name, []).append(step)
    return taken


def _put_edited(program: Program, leaves: Leaves, values: dict[str, Any]) -> None:
    """Norm gains and biases that took a scale, in their place in the tree."""
    edited: dict[int, list[Any]] = {}
    for key in leaves.edits:
        edited.setdefault(key[0], []).append(key)
    for number, keys in edited.items():
        path = program.paths[number]
        if is_quantized(values[path]):
            continue
        whole = leaves.stored((number, ()))
        for key in keys:
            layer = leaves.read(key)
            whole = whole.at[key[1]].set(layer) if key[1] else layer
        values[path] = whole
