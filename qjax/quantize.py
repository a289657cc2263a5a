"""The driver: trace, plan, solve, and put the quantized leaves in place."""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from math import prod, sqrt
from pathlib import Path
from typing import Any

import jax
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from qjax.calibrate import Plan, calibrate
from qjax.core.lazy import LazyLeaf
from qjax.core.qtensor import QTensor, Stacked, is_quantized
from qjax.io.journal import fingerprint, open_journal
from qjax.placement import Placement
from qjax.planning import plan
from qjax.recipes import (
    allocated,
    check_quantizes,
    is_quantizer,
    needs_data,
    steps_of,
)
from qjax.report import LeafReport, Report
from qjax.solving import BATCH_BYTES, Job, Pieces, gather, solve_all, tensor_of
from qjax.streaming import Options
from qjax.trace.batches import as_batch, as_batches
from qjax.trace.paths import flatten_with_paths
from qjax.trace.program import trace
from qjax.trace.sites import Sites, sites


def quantize(
    f: Any,
    params: Any,
    recipe: Any,
    calibration: Iterable[Any] | None = None,
    **options,
) -> Any:
    """`params` with the recipe's leaves quantized; the tree's paths stay as they are.

    Leaves that one step takes, and that read one activation in one block of layers,
    share the second scale of NVFP4; which of them a server runs as one linear is not
    asked.

    Args:
      f: `f(params, *inputs)`.
      params: a pytree; leaves may be `LazyLeaf`, read one at a time.
      recipe: a method such as `RTN("W4A16")`, or a tuple of them.
      calibration: batches, each a tuple `inputs`. Methods that need no data only trace
        the first, whose arrays may be `jax.ShapeDtypeStruct`.
      **options: those of `quantize_with_report`.

    Raises:
        ValueError: a pattern matches nothing, a weight is NaN or Inf, or neither
            calibration nor example was given.
        TypeError: a batch or the example is no tuple.
    """
    return quantize_with_report(f, params, recipe, calibration, **options)[0]


def quantize_with_report(
    f: Any,
    params: Any,
    recipe: Any,
    calibration: Iterable[Any] | None = None,
    *,
    example: Any = None,
    key: Any = None,
    batch_bytes: int | None = None,
    progress: bool = True,
    donate: bool = False,
    mask_fn: Callable[..., Any] | None = None,
    offload: bool = False,
    resume: str | os.PathLike[str] | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> tuple[Any, Report]:
    """`quantize`, and a report per leaf.

    Args:
      f, params, recipe, calibration: as for `quantize`.
      example: one batch `inputs` to trace with, in place of `calibration`.
      key: for methods that draw random numbers (stochastic rounding).
      batch_bytes: float32 bytes of weights solved at once, at least one matrix.
        Default: 256 MiB, but not more than the largest leaf.
      progress: show a progress bar.
      donate: delete each float array of `params` as soon as it is replaced.
      mask_fn: `mask_fn(*inputs)` gives a weight for each token of a batch; padding has
        weight 0 and never enters a statistic.
      offload: keep activations on the host between the segments of the program.
      resume: a folder in which finished blocks are kept; a run that was killed and is
        started again with the same arguments continues after the last of them, with the
        same result bit for bit; a folder of a run with other arguments is refused, see
        `qjax.io.journal.fingerprint`. Only for recipes that need data.
      mesh: devices with the axes "data" (calibration batches) and "model" (output
        features of the solvers), of one process or of several that are given the same
        arguments; the order of sums then differs from one device's.
    """
    steps = steps_of(recipe)
    check_quantizes(steps)
    if key is None and any(getattr(step, "random", False) for step in steps):
        raise ValueError("the recipe draws random numbers; give key=jax.random.key(0)")
    batches = None if calibration is None else as_batches(calibration)
    given = {"example": example, "mask_fn": mask_fn}
    steps, allocations = allocated(steps, f, params, batches, **given)
    found = sites(f, params, *_example(batches, example))
    leaves = dict(flatten_with_paths(params))
    quantizers = [step for step in steps if is_quantizer(step)]
    jobs = plan(quantizers, found, leaves)
    fallbacks = {job.path: _fallback(found, job) for job in jobs}
    shared = _shared_arrays(leaves) if donate else set()
    rows: dict[str, list[LeafReport]] = {}

    def place(job: Job, pieces: Pieces) -> None:
        new, rows[job.path] = _assemble(job, pieces, quantizers, fallbacks[job.path])
        old, leaves[job.path] = leaves[job.path], new
        if donate and isinstance(old, jax.Array) and id(old) not in shared:
            jax.block_until_ready(new)
            old.delete()

    with _bar(progress) as bar:
        task = bar.add_task("quantizing", total=sum(job.weights for job in jobs))
        advance = partial(bar.advance, task)
        done = Report(())
        if any(needs_data(step) for step in steps):
            given = _batches(batches)
            journal = None
            if resume is not None:
                masks = [None if mask_fn is None else mask_fn(*b) for b in given]
                program = trace(f, params, given[0])
                run = fingerprint(steps, program, given, masks, key, mesh)
                several = jax.process_count() > 1
                own = f"process-{jax.process_index()}" if several else ""
                journal = open_journal(Path(resume) / own, run)
            settings = Options(mask_fn, offload, key, Placement(mesh), journal)
            passes = Plan(f, params, found, jobs, steps, settings)
            done = calibrate(passes, given, advance, place, leaves)
        else:
            budget = _budget(leaves) if batch_bytes is None else batch_bytes
            for job, pieces in solve_all(jobs, quantizers, key, budget, advance):
                place(job, pieces)
    treedef = jax.tree.structure(params, is_leaf=is_quantized)
    ready = [x.read() if isinstance(x, LazyLeaf) else x for x in leaves.values()]
    in_order = [row for path in leaves for row in rows.get(path, ())]
    notes = (*_notes(found, quantizers), *done.notes)
    whole = Report(
        tuple(in_order), notes, done.sites, done.transforms, tuple(allocations)
    )
    return jax.tree.unflatten(treedef, ready), whole


def _batches(batches: list[Any] | None) -> list[tuple[Any, ...]]:
    """The calibration batches, each a tuple of arrays.

    Raises:
        ValueError: there are none, or they are shapes only.
    """
    if not batches:
        raise ValueError(
            "the recipe needs calibration data: give calibration=[(inputs, ...), ...]"
        )
    abstract = any(
        isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(batches)
    )
    if abstract:
        raise ValueError(
            "the recipe needs calibration data, but the batches are shapes "
            "(jax.ShapeDtypeStruct); give arrays"
        )
    return batches


def _assemble(
    job: Job, pieces: Pieces, steps: Sequence[Any], fallback: str
) -> tuple[QTensor | Stacked, list[LeafReport]]:
    """The quantized leaf, in runs of layers of one method."""
    parts, ranges, rows = [], [], []
    runs = groupby(range(len(job.names)), key=lambda layer: job.steps[layer])
    for step, layers in ((s, list(run)) for s, run in runs):
        assert step is not None
        start, stop = layers[0], layers[-1] + 1
        numbers = range(start * job.per_name, stop * job.per_name)
        part = _qtensor(job, pieces, numbers, stop - start, steps[step])
        row = _row(job, pieces, numbers, steps[step], part, fallback)
        parts.append(part)
        ranges.append((start, stop))
        rows.append(replace(row, names=job.names[start:stop]))
    whole = parts[0] if len(parts) == 1 else Stacked(tuple(parts), tuple(ranges))
    return whole, rows


def _qtensor(
    job: Job, pieces: Pieces, numbers: Sequence[int], layers: int, method: Any
) -> QTensor:
    lead = _lead(job, layers)
    solved = jax.tree.map(
        lambda x: x.reshape(*lead, *x.shape[1:]), gather(pieces, numbers)
    )
    return tensor_of(solved, job.layout, job.dtype, method)


def _lead(job: Job, layers: int) -> tuple[int, ...]:
    """Leading axes `[*layers, *experts]` of a run of so many layers."""
    own = len(job.shape) - len(job.layout.roles)
    batch = tuple(job.shape[own + i] for i in job.layout.axes("b"))
    stacked = job.shape[:own] if layers == len(job.names) else (layers,)
    return (*stacked, *batch)


def _row(
    job: Job,
    pieces: Pieces,
    numbers: Sequence[int],
    method: Any,
    part: QTensor,
    fallback: str,
) -> LeafReport:
    mine = [pieces[i] for i in numbers]
    error, norm = sum(p.error for p in mine), sum(p.norm for p in mine)
    return LeafReport(
        job.path,
        job.names,
        type(method).__name__,
        method.format.name,
        method.activation.format.name if method.activation else "float",
        part.bits_per_weight,
        sqrt(error / norm) if norm else 0.0,
        sum(p.seconds for p in mine),
        fallback,
    )


def _example(calibration: Any, example: Any) -> tuple[Any, ...]:
    batch = example
    if batch is None and calibration is not None:
        batch = next(iter(calibration), None)
    if batch is None:
        raise ValueError(
            "quantize traces f once: give calibration=[(inputs, ...)] or "
            "example=(inputs, ...); jax.ShapeDtypeStruct will do"
        )
    return as_batch(batch, "example")


def _budget(leaves: dict[str, Any]) -> int:
    largest = max(prod(x.shape) for x in leaves.values() if hasattr(x, "shape"))
    return min(BATCH_BYTES, 4 * largest)


def _shared_arrays(leaves: dict[str, Any]) -> set[int]:
    """Arrays at more than one place of the tree; another place may still need them."""
    seen = [id(x) for x in leaves.values()]
    return {i for i in seen if seen.count(i) > 1}


def _fallback(found: Sites, job: Job) -> str:
    """The uses of the leaf that the low-bit path does not serve."""
    other = [u for u in found.sites if u.path == job.path and u.layout != job.layout]
    texts = [f"{u.kind} reads it as {u.layout}" for u in other]
    texts += [
        f"{u.primitive}: {u.reason}" for u in found.other_uses if u.path == job.path
    ]
    return f"dequantized where {'; '.join(texts)}" if texts else ""


def _notes(found: Sites, steps: Sequence[Any]) -> tuple[str, ...]:
    tied = {s.path for s in found.sites if s.kind == "embedding"} & {
        s.path for s in found.sites if s.kind == "dot"
    }
    if found.head is None and not tied and any(not step.targets for step in steps):
        return (
            "the function declares no head: a step without targets takes the last "
            "linear like every other",
        )
    return ()


def _bar(shown: bool) -> Progress:
    return Progress(
        TextColumn("quantizing"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        disable=not shown,
    )
