"""The pass of the transforming steps: scales on activations, folded where possible.

It runs in full precision, on the program as it is: a transform never changes what the
function computes. What it finds is kept in `Leaves`, whose reads then give the scaled
weights.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.core.qtensor import is_quantized
from qjax.core.statistics import Hessian
from qjax.core.transforms import Diagonal
from qjax.leaves import Leaves
from qjax.methods.base import Choice, Group
from qjax.report import TransformReport
from qjax.scalesearch import (
    Search,
    linear_errors,
    module_errors,
    outputs_only,
    region,
)
from qjax.streaming import Options
from qjax.trace.fold import Fold, Folder, pooled
from qjax.trace.rows import Accumulator, finalized, leading, mask_fits, refusal
from qjax.trace.segments import Segment
from qjax.trace.stream import Lane, LeafKey, Point, Stream, find_points

MOMENTS = "moments of the input"


@dataclass
class TransformPass:
    """A streaming pass of the transforming steps.

    Attributes:
      lanes: the program for every shape of batch.
      steps: the transforms, by the name of the site that each takes.
      formats: the weight format that each site will have, by name.
      name: of a layer of a leaf.
      leaves: where what was found is kept.
      options: see `Options`.
      reports: one row for each group of sites.
      scales: by the first key of a point, what its input was divided by so far.
    """

    lanes: Sequence[Lane]
    steps: Mapping[str, Sequence[Any]]
    formats: Mapping[str, Any]
    name: Callable[[LeafKey], str]
    leaves: Leaves
    options: Options
    reports: list[TransformReport] = field(default_factory=list)
    accumulator: Accumulator = field(default_factory=Accumulator)
    scales: dict[LeafKey, np.ndarray] = field(default_factory=dict)

    def run(self, batches: Sequence[Any], masks: Sequence[Any]) -> None:
        """The whole pass."""
        self.masks = masks
        self.accumulator = Accumulator(self.options.placement)
        wanted = set(self.steps)
        points = find_points(
            self.lanes, lambda key: self.name(key) in wanted, self.name
        )
        self.stream = Stream(
            self.lanes, points, self.leaves.stored, offload=self.options.offload
        )
        self.folder = Folder(self.lanes[0].tape)
        self.stream.start(batches)
        journal = self.options.journal
        done = {} if journal is None else self.recall(journal)
        for point in self.stream:
            if self.stream.at in done:
                for found in done[self.stream.at]:
                    self.apply(point, found)
                continue
            found, before = [], len(self.reports)
            for step in dict.fromkeys(s for n in point.names for s in self.steps[n]):
                found.append(self.transform(point, step))
            if journal is not None:
                rows = self.reports[before:]
                journal.write("transform", self.stream.at, found, rows)

    def recall(self, journal: Any) -> dict[int, Any]:
        """What an earlier run found, by point."""
        found = {}
        for number in journal.numbers("transform"):
            found[number], rows = journal.read("transform", number)
            self.reports += [
                TransformReport(**{**row, "names": tuple(row["names"])}) for row in rows
            ]
        return found

    def transform(self, point: Point, step: Any) -> dict[str, Any]:
        """One step on the sites of one point; what it found."""
        op = point.meetings[0]
        members = [n for n in point.names if step in self.steps[n]]
        fold = self.folder.find(point.meetings)
        reason = refusal(op) or self.reason(point, step, members, fold)
        if reason:
            self.note(step, members, fold, Choice(None, remark=reason))
            return {"scale": None, "limits": []}
        group = self.group(point, step, fold)
        choice = step.transform(group)
        check_scale(step, members, choice.scale)
        self.note(step, members, fold, choice)
        scale = choice.scale
        found: dict[str, Any] = {
            "scale": None if scale is None else np.asarray(scale, np.float32)
        }
        self.apply(point, {**found, "limits": []})
        found["limits"] = self.limits(point, step, group, scale)
        self.apply(point, {**found, "scale": None})
        return found

    def apply(self, point: Point, found: Any) -> None:
        """Scale and clip as was found."""
        if found["scale"] is not None:
            fold = self.folder.find(point.meetings)
            self.keep(point, fold, np.asarray(found["scale"]))
        for key, op, limits in zip(point.keys, point.meetings, found["limits"]):
            if limits is None:
                continue
            rows = self.formats[self.name(key)].granularity.rows
            edit = partial(_clipped, op.call.layout, rows, limits)
            known = self.leaves.inverses
            if key in known:
                known[key] = _both(known[key], edit)
            else:
                self.leaves.edits.setdefault(key, []).append(edit)

    def reason(self, point: Point, step: Any, members: Any, fold: Fold | str) -> str:
        """Why a step leaves the sites alone; empty if it does not."""
        if point.inside:
            return f"inside {point.inside}"
        if len(members) < len(point.names):
            left = next(n for n in point.names if n not in members)
            return f"{left} reads the same input and is not transformed"
        readers = set(self.folder.readers.get(point.meetings[0].x, ()))
        outside = readers - set(point.meetings)
        if isinstance(fold, str) and not step.online:
            return f"not folded: {fold}" + (f" ({len(outside)})" if outside else "")
        if leading(point.meetings[0]):
            return "its input is that of several experts"
        if step.norms_only and not step.online and not getattr(fold, "norm", True):
            return "its input comes from no norm"
        for target in () if isinstance(fold, str) else fold.targets:
            if is_quantized(self.leaves.values[target.key[0]]):
                return f"not folded: {self.name(target.key)} is quantized already"
        return ""

    def group(self, point: Point, step: Any, fold: Fold | str) -> Group:
        """What the step is given."""
        statistics = dict(step.statistics)
        module = getattr(step, "objective", "site") == "module"
        linear = outputs_only(
            self.lanes[0].tape,
            self.region(self.lanes[0], *point.places[0], module),
            point.meetings,
        )
        if linear:
            statistics[MOMENTS] = Hessian()
        op = point.meetings[0]
        seen = self.accumulator.init(statistics, op)
        # The stream knows nothing of what earlier steps did with this input.
        before = self.scales.get(point.keys[0])
        move = None if before is None else Diagonal(jnp.asarray(1 / before))
        for number, op, x, full, rest in self.stream.inputs(point):
            mask = self.masks[number]
            fits = mask is not None and mask_fits(op, x, mask)
            mask = mask if fits else None
            seen = self.accumulator.update(
                statistics, op, seen, x, full, rest, mask, move
            )
        ws = tuple(
            op.call.layout.to_matrix(self.leaves.inner(key))
            for key, op in zip(point.keys, point.meetings)
        )
        formats = tuple(self.formats[name] for name in point.names)

        def tied(values: Any) -> Any:
            if isinstance(fold, str):
                return values
            ones = pooled(jnp.ones_like(values), fold, jax.ops.segment_sum)
            return pooled(values, fold, jax.ops.segment_sum) / ones

        stats = finalized(statistics, seen)

        def errors(scales: Any, module: bool) -> Any:
            if linear:
                h = stats[MOMENTS] * seen.tokens
                return np.asarray(linear_errors(formats, scales, ws, h))
            if before is None:
                return self.errors(point, ws, formats, scales, module)
            assert move is not None
            plain = tuple(move.left(w) for w in ws)
            return self.errors(point, plain, formats, scales * before, module)

        producer = self.producer(fold)
        return Group(point.names, ws, formats, stats, tied, errors, producer)

    def producer(self, fold: Fold | str) -> Any:
        """The linear that makes the input, its columns in the order of the features."""
        if isinstance(fold, str):
            return None
        for target in fold.targets:
            if target.kind == "columns":
                layer = self.leaves.inner(target.key)
                return target.op.call.layout.to_matrix(layer)[:, fold.channels]
        return None

    def errors(
        self, point: Point, ws: Any, formats: Any, scales: Any, module: bool
    ) -> np.ndarray:
        """Squared output error of every candidate scale, over all batches."""
        total = np.zeros(scales.shape[0])
        for n, (lane, (start, meetings)) in enumerate(zip(self.lanes, point.places)):
            segment = self.region(lane, start, meetings, module)
            leaves = [self.leaves.stored(key) for key in segment.leaves]
            constants = [lane.tape.constants[c] for c in segment.constants]
            views = tuple(m.weight.view for m in meetings)
            code = Search(segment.key, formats, views, (lane.tape, segment, meetings))
            for env in self.stream.values[n]:
                ins = [env[v] for v in segment.ins]
                found = module_errors(code, scales, ws, leaves, constants, ins)
                total += np.asarray(found)
        return total

    def region(
        self, lane: Lane, start: int, meetings: Sequence[Any], module: bool
    ) -> Segment:
        """From the sites to the last operation of the module that holds them."""
        return region(lane.tape, self.name, start, meetings, module)

    def keep(self, point: Point, fold: Fold | str, scale: np.ndarray) -> None:
        """Fold the scale, or leave it on the activation."""
        whole = scale * self.scales.get(point.keys[0], np.float32(1))
        self.scales[point.keys[0]] = whole
        known = self.leaves.inverses
        for key, op in zip(point.keys, point.meetings):
            edit = partial(_scaled_rows, op.call.layout, scale)
            if isinstance(fold, str):
                self.leaves.moves[key] = Diagonal(jnp.asarray(1 / whole))
                known[key] = _both(known[key], edit) if key in known else edit
            else:
                self.leaves.edits.setdefault(key, []).append(edit)
        if isinstance(fold, str):
            return
        by_channel = np.ones(fold.count, np.float32)
        by_channel[fold.channels] = scale
        for target in fold.targets:
            edit = partial(target.divide, s=jnp.asarray(by_channel))
            self.leaves.edits.setdefault(target.key, []).append(edit)

    def limits(self, point: Point, step: Any, group: Group, scale: Any) -> list[Any]:
        """Clipping limits of each site's scaled weights; None where there are none."""
        if not getattr(step, "clip", False):
            return []
        scale = jnp.ones(group.ws[0].shape[0]) if scale is None else scale
        return [
            step.limits(
                self.name(key),
                op.call.layout.to_matrix(self.leaves.inner(key)),
                group.stats,
                format,
                jnp.asarray(scale),
            )
            for key, op, format in zip(point.keys, point.meetings, group.formats)
        ]

    def note(self, step: Any, members: Any, fold: Fold | str, choice: Choice) -> None:
        """A row of the report."""
        folded = (
            ""
            if isinstance(fold, str)
            else [self.name(target.key) for target in fold.targets]
        )
        applied = choice.scale is not None
        into = ", ".join(folded) if folded else "the activation"
        self.reports.append(
            TransformReport(
                tuple(members),
                type(step).__name__,
                into if applied else "",
                choice.error_before,
                choice.error,
                dict(choice.notes),
                choice.remark,
            )
        )


def check_scale(step: Any, members: Sequence[str], scale: Any) -> None:
    """Refuse a scale that would change the function.

    Raises:
      ValueError: it is not positive and finite; naming the step and the first site.
    """
    if scale is None:
        return
    good = np.isfinite(scale) & (np.asarray(scale) > 0)
    if not good.all():
        raise ValueError(
            f"{type(step).__name__} chose {np.sum(~good)} scales of {good.size} for "
            f"{members[0]} that are not positive and finite; calibrate with inputs for "
            "which the model is finite"
        )


def _scaled_rows(layout: Any, scale: Any, layer: Any) -> Any:
    exact = layout.to_matrix(layer).astype(jnp.float32)
    return layout.from_matrix(exact * scale[:, None]).astype(layer.dtype)


def _clipped(layout: Any, rows: int | None, limits: Any, layer: Any) -> Any:
    matrix = layout.to_matrix(layer)
    K = matrix.shape[0]
    limit = jnp.repeat(limits, rows or K, axis=0)[:K].astype(matrix.dtype)
    return layout.from_matrix(jnp.clip(matrix, -limit, limit))


def _both(first: Any, second: Any) -> Any:
    return lambda layer: second(first(layer))
