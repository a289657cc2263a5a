"""The driver: trace, plan, solve, and put the quantized leaves in place."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from math import prod, sqrt
from typing import Any

import jax
import jax.numpy as jnp
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from qjax.core.lazy import LazyLeaf
from qjax.core.qtensor import QTensor, SiteActs, Stacked, is_quantized
from qjax.recipes import Candidate, assign, steps_of
from qjax.solving import BATCH_BYTES, Job, Pieces, gather, solve_all
from qjax.trace.paths import flatten_with_paths
from qjax.trace.sites import Site, Sites, sites


@dataclass(frozen=True)
class LeafReport:
    """What happened to a leaf, or to a run of layers of a stacked leaf.

    Attributes:
      path: the leaf's path.
      names: the names (layers) that this row is about.
      method: class name of the method.
      format: name of the weight format.
      activations: name of the activation format, or "float".
      bits_per_weight: all arrays counted.
      error: relative Frobenius error of the weights.
      seconds: time to solve, compilation included.
      fallback: what could not be done as asked; empty if nothing.
    """

    path: str
    names: tuple[str, ...]
    method: str
    format: str
    activations: str
    bits_per_weight: float
    error: float
    seconds: float
    fallback: str = ""


@dataclass(frozen=True)
class Report:
    """One `LeafReport` per quantized leaf, and remarks about the whole."""

    leaves: tuple[LeafReport, ...]
    notes: tuple[str, ...] = ()

    def __iter__(self):
        return iter(self.leaves)

    def __len__(self) -> int:
        return len(self.leaves)

    def __getitem__(self, index: int) -> LeafReport:
        return self.leaves[index]

    def table(self) -> Table:
        """The report for a terminal."""
        columns = ("leaf", "method", "format", "activations", "bits", "error", "s")
        table = Table(*columns, "fallback")
        for row in self.leaves:
            bits, error = f"{row.bits_per_weight:.3f}", f"{row.error:.4f}"
            rest = (row.method, row.format, row.activations, bits, error)
            last = (f"{row.seconds:.2f}", row.fallback)
            table.add_row(_shown(row.path, row.names), *rest, *last)
        return table


def quantize(
    f: Any,
    params: Any,
    recipe: Any,
    calibration: Iterable[Any] | None = None,
    **options,
) -> Any:
    """`params` with the recipe's leaves quantized; the tree's paths stay as they are.

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
    """
    return quantize_with_report(f, params, recipe, calibration, **options)[0]


def quantize_with_report(
    f: Any,
    params: Any,
    recipe: Any,
    calibration: Iterable[Any] | None = None,
    *,
    example: tuple[Any, ...] | None = None,
    key: Any = None,
    batch_bytes: int | None = None,
    progress: bool = True,
    donate: bool = False,
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
    """
    steps = steps_of(recipe)
    if key is None and any(step.random for step in steps):
        raise ValueError("the recipe draws random numbers; give key=jax.random.key(0)")
    found = sites(f, params, *_example(calibration, example))
    leaves = dict(flatten_with_paths(params))
    jobs = plan(steps, found, leaves)
    budget = _budget(leaves) if batch_bytes is None else batch_bytes
    fallbacks = {job.path: _fallback(found, job) for job in jobs}
    shared = _shared_arrays(leaves) if donate else set()
    rows: dict[str, list[LeafReport]] = {}
    with _bar(progress) as bar:
        task = bar.add_task("quantizing", total=sum(job.weights for job in jobs))
        advance = partial(bar.advance, task)
        for job, pieces in solve_all(jobs, steps, key, budget, advance):
            new, rows[job.path] = _assemble(job, pieces, steps, fallbacks[job.path])
            old, leaves[job.path] = leaves[job.path], new
            if donate and isinstance(old, jax.Array) and id(old) not in shared:
                jax.block_until_ready(new)
                old.delete()
    treedef = jax.tree.structure(params, is_leaf=is_quantized)
    ready = [x.read() if isinstance(x, LazyLeaf) else x for x in leaves.values()]
    in_order = [row for path in leaves for row in rows.get(path, ())]
    return jax.tree.unflatten(treedef, ready), Report(
        tuple(in_order), _notes(found, steps)
    )


def plan(steps: Sequence[Any], found: Sites, leaves: dict[str, Any]) -> list[Job]:
    """The leaves that the recipe takes, each with the step of every layer.

    Raises:
        ValueError: a step takes nothing, or takes part of a stack that must stay whole.
    """
    by_path: dict[str, list[Site]] = {}
    for site in found.sites:
        usable = site.layout is not None
        if usable and not is_quantized(leaves[site.path]):
            by_path.setdefault(site.path, []).append(site)
    candidates = [
        Candidate(
            path,
            _names(uses),
            frozenset(u.kind for u in uses),
            spared=path == found.head or path in found.routers,
        )
        for path, uses in by_path.items()
    ]
    assigned = assign(steps, candidates)
    return [
        _job(candidate.names, by_path[candidate.path], leaves[candidate.path], numbers)
        for candidate in candidates
        for numbers in [assigned[candidate.path]]
        if any(step is not None for step in numbers)
    ]


def _names(uses: Sequence[Site]) -> tuple[str, ...]:
    """One name per layer of a stacked leaf, also where each layer is its own use."""
    names = {name for use in uses for name in use.names}
    in_order = sorted(
        names,
        key=lambda n: [
            (p.isdigit(), int(p) if p.isdigit() else p) for p in n.split("/")
        ],
    )
    whole = len(names) == prod(uses[0].stacked)
    return tuple(in_order) if whole else (uses[0].path,)


def _job(
    names: tuple[str, ...],
    uses: list[Site],
    leaf: Any,
    assigned: tuple[int | None, ...],
) -> Job:
    main = _main_use(uses)
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise ValueError(
            f"{main.path} is {leaf.dtype}; only float leaves are quantized"
        )
    _check_mesh(main.path, leaf)
    if len(set(assigned)) > 1:
        _check_mixed(main, names, assigned)
    read = leaf.read if isinstance(leaf, LazyLeaf) else lambda: leaf
    assert main.layout is not None
    return Job(
        main.path,
        names,
        read,
        main.layout,
        tuple(leaf.shape),
        leaf.dtype,
        assigned,
    )


def _main_use(uses: Sequence[Site]) -> Site:
    """The use whose K and N the codes follow: a contraction before a lookup."""
    return next((u for u in uses if u.kind != "embedding"), uses[0])


def _check_mesh(path: str, leaf: Any) -> None:
    sharding = getattr(leaf, "sharding", None)
    if not isinstance(sharding, jax.NamedSharding) or sharding.is_fully_replicated:
        return
    if jax.sharding.AxisType.Explicit in sharding.mesh.axis_types:
        raise ValueError(
            f"{path} is sharded over a mesh with explicit axes; make the mesh with "
            "axis_types=(jax.sharding.AxisType.Auto, ...)"
        )


def _check_mixed(
    site: Site, names: tuple[str, ...], assigned: tuple[int | None, ...]
) -> None:
    if len(site.stacked) > 1:
        raise ValueError(
            f"{site.path} is stacked over {len(site.stacked)} axes {site.stacked}; its "
            "layers must all be quantized alike"
        )
    left = [name for name, step in zip(names, assigned) if step is None]
    if left:
        raise ValueError(
            f"{site.path} is one stacked leaf, so that {left[0]} cannot stay in float "
            "while other layers are quantized; give it a step too, such as "
            "RTN('W8A16'), or do not stack the layers"
        )


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
    coded = gather(job, pieces, numbers)
    lead = _lead(job, layers)
    shaped = jax.tree.map(lambda x: x.reshape(*lead, *x.shape[1:]), coded)
    acts = (SiteActs(activation=method.activation),) if method.activation else ()
    return QTensor.of(shaped, job.layout, job.dtype, acts)


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
    if not isinstance(batch, (tuple, list)):
        raise TypeError(
            f"a batch is a tuple of f's inputs, got {type(batch).__name__}; "
            "write (tokens,) for one input"
        )
    return tuple(batch)


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


def _shown(path: str, names: tuple[str, ...]) -> str:
    return names[0] if len(names) == 1 else f"{path} ({len(names)} layers)"


def _bar(shown: bool) -> Progress:
    return Progress(
        TextColumn("quantizing"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        disable=not shown,
    )
