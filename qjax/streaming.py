"""Quantization with data: the driver of the streaming pass.

At every point of the pass the statistics of one activation are taken, the sites that
read it are solved together, and the pass goes on with their quantized weights.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.blocksolver import enter, planned, solve_block
from qjax.core.statistics import Cross
from qjax.leaves import Leaves
from qjax.outcomes import check, check_ranges, site_report
from qjax.placement import NOWHERE, Placement
from qjax.report import SiteReport
from qjax.sitesolver import Problem, solve_sites, statistics_of
from qjax.solving import Job, Piece, Pieces, site_key, tensor_of
from qjax.trace.blocks import block_points
from qjax.trace.marks import Marks
from qjax.trace.paired import unpaired
from qjax.trace.rows import Accumulator, Seen, refusal
from qjax.trace.stream import Lane, LeafKey, Point, Stream, find_points, key_of

UNPAIRED = (
    "the experts' rows are sorted by each stream's own routing inside {}: the drift of "
    "the input was taken as zero"
)
MASK_UNFIT = "the mask does not fit {}: padding was counted"


@dataclass(frozen=True)
class Options:
    """How a pass runs.

    Attributes:
      mask_fn: token weights of a batch, `mask_fn(*inputs)`, with one element for each
        token; padding has weight 0.
      offload: whether activations wait on the host.
      key: for methods that draw random numbers.
      placement: the mesh.
      journal: where finished blocks are kept, so that a killed run continues.
    """

    mask_fn: Callable[..., Any] | None = None
    offload: bool = False
    key: Any = None
    placement: Placement = NOWHERE
    journal: Any = None


@dataclass
class Pass:
    """A streaming pass of the quantizing steps.

    Attributes:
      lanes: the program for every shape of batch.
      jobs: the leaves to quantize.
      steps: the recipe's quantizing steps, by the numbers in `Job.steps`.
      repairs: steps that mend what was quantized, by path.
      leaves: the float leaves, with the transforms that were found for them.
      options: see `Options`.
      advance: called with the number of weights solved.
      namer: the name of a layer of any leaf.
      pieces: what was solved so far, by path.
      reports: one row for each site, in order.
      recorded, first: rows and points that the journal holds already.
    """

    lanes: Sequence[Lane]
    jobs: Sequence[Job]
    steps: Sequence[Any]
    repairs: Mapping[str, Sequence[Any]]
    leaves: Leaves
    options: Options
    advance: Callable[[int], None]
    namer: Callable[[LeafKey], str] = str
    pieces: dict[str, Pieces] = field(default_factory=dict)
    reports: list[SiteReport] = field(default_factory=list)
    accumulator: Accumulator = field(default_factory=Accumulator)
    recorded: int = 0
    first: int = 0

    def __post_init__(self):
        self.accumulator = Accumulator(self.options.placement)
        self.paths = self.lanes[0].program.paths
        self.by_path = {job.path: job for job in self.jobs}
        self.pieces = {job.path: {} for job in self.jobs}
        points = self.points()
        needs = {self.step(key) for point in points for key in point.keys}
        self.stream = Stream(
            self.lanes,
            points,
            self.leaves.read,
            full=any(getattr(step, "full_precision", False) for step in needs),
            paired=any(map(_drifts, needs)),
            offload=self.options.offload,
        )

    def points(self) -> list[Point]:
        """Where the pass stops: in front of sites, and in front of whole blocks."""
        blockwise = {
            key: getattr(self.step(key), "blockwise", False)
            for lane in self.lanes
            for key in (key_of(op) for _, op in lane.meetings)
            if self.wanted(key)
        }
        alone = find_points(self.lanes, lambda k: blockwise.get(k) is False, self.name)
        if not any(blockwise.values()):
            return alone
        blocks = block_points(self.lanes, lambda k: blockwise.get(k, False), self.namer)
        return sorted([*blocks, *alone], key=lambda point: point.places[0][0])

    def layer(self, key: LeafKey) -> int:
        """Which of the job's names a layer of a leaf has."""
        job = self.by_path[self.paths[key[0]]]
        sizes = job.shape[: len(job.shape) - len(job.layout.roles)]
        return int(np.ravel_multi_index(key[1], sizes)) if key[1] else 0

    def wanted(self, key: LeafKey) -> bool:
        """Whether a step takes this layer of this leaf."""
        job = self.by_path.get(self.paths[key[0]])
        if job is None or len(key[1]) != len(job.shape) - len(job.layout.roles):
            return False
        return job.steps[self.name_number(job, key)] is not None

    def name_number(self, job: Job, key: LeafKey) -> int:
        """The number of the layer's name; one name may stand for all layers."""
        return self.layer(key) if len(job.names) > 1 else 0

    def name(self, key: LeafKey) -> str:
        """`layers/3/attn/q_proj/kernel`."""
        job = self.by_path[self.paths[key[0]]]
        return job.names[self.name_number(job, key)]

    def step(self, key: LeafKey) -> Any:
        """The step that takes a layer of a leaf."""
        job = self.by_path[self.paths[key[0]]]
        number = job.steps[self.name_number(job, key)]
        return None if number is None else self.steps[number]

    def run(self, batches: Sequence[Any], masks: Sequence[Any]) -> None:
        """The whole pass, then what it did not reach."""
        self.masks, self.marks = masks, Marks(self.stream, masks)
        self.stream.start(batches, self.marks.kept)
        done = self.recall()
        for point in self.stream:
            if self.stream.at >= done:
                self.solve(point)
                self.record(self.stream.at)
        self.solve_unreached()

    def recall(self) -> int:
        """Take what an earlier run solved; the number of points that are done."""
        journal, done = self.options.journal, 0
        if journal is None:
            return 0
        for number in journal.numbers("block"):
            tree, rows = journal.read("block", number)
            for path, pieces in tree.items():
                for first, solved in pieces.items():
                    self.take_back(path, int(first), solved)
            self.reports += [SiteReport(**row) for row in rows]
            done = self.first = number + 1
        if done and done - 1 in journal.numbers("live"):
            self.stream.resume(journal.read("live", done - 1)[0])
            self.stream.at = done
        self.recorded = len(self.reports)
        return done

    def take_back(self, path: str, first: int, kept: Any) -> None:
        """One layer of a leaf as it was solved before."""
        job = self.by_path[path]
        count = job.slices_per_layer
        solved, numbers = kept["solved"], kept["numbers"]
        for i in range(count):
            self.pieces[path][first + i] = Piece(solved, i, *map(float, numbers[i]))
        sizes = job.shape[: len(job.shape) - len(job.layout.roles)]
        index = tuple(int(n) for n in np.unravel_index(first // count, sizes))
        key = self.paths.index(path), index
        layer = jax.tree.map(lambda x: x.reshape(*job.experts, *x.shape[1:]), solved)
        self.stream.solved[key] = tensor_of(
            layer, job.layout, job.dtype, self.step(key)
        )
        self.advance(count * job.layout.K * job.layout.N)

    def record(self, number: int) -> None:
        """Behind the last point of a block, keep what was solved in it."""
        journal, points = self.options.journal, self.stream.points
        last = number + 1 == len(points)
        if journal is None or not (
            last or points[number + 1].block != points[number].block
        ):
            return
        rows = self.reports[self.recorded :]
        tree: dict[str, Any] = {}
        for key in (k for p in self.unrecorded() for k in p.keys):
            path, job = self.paths[key[0]], self.by_path[self.paths[key[0]]]
            first = self.layer(key) * job.slices_per_layer
            pieces = [self.pieces[path][first + i] for i in range(job.slices_per_layer)]
            numbers = [[p.seconds, p.error, p.norm] for p in pieces]
            tree.setdefault(path, {})[first] = {
                "solved": pieces[0].solved,
                "numbers": numbers,
            }
        # The activations first: a block without them is replayed, never the reverse.
        journal.keep_live(number, self.stream.live())
        journal.write("block", number, tree, rows)
        self.recorded, self.first = len(self.reports), number + 1

    def unrecorded(self) -> Sequence[Point]:
        """The points since the last recorded one."""
        return self.stream.points[self.first : self.stream.at + 1]

    def solve(self, point: Point) -> None:
        """Statistics of the point's input, and its sites solved."""
        if point.blocks:
            self.solve_block(point)
            return
        start = time.perf_counter()
        problems = [
            self.problem(key, op) for key, op in zip(point.keys, point.meetings)
        ]
        statistics = statistics_of(problems)
        move = self.leaves.move(point.keys[0])
        seen, remark = self.observe(point, statistics, move)
        solved = solve_sites(
            problems, statistics, seen, self.options.key, self.options.placement
        )
        bad = int(np.sum(np.asarray(seen.bad)))
        check(problems, solved, f"the input of {problems[0].name}", bad)
        check_ranges(problems, solved, [self.coded(key) for key in point.keys])
        seconds = (time.perf_counter() - start) / len(problems)
        for key, problem, each in zip(point.keys, problems, solved):
            self.keep(key, problem, each, seconds, remark, move)

    def solve_block(self, point: Point) -> None:
        """The sites of a block, on its inputs in the quantized stream."""
        start, placement = time.perf_counter(), self.options.placement
        problems = [
            self.problem(key, op) for key, op in zip(point.keys, point.meetings)
        ]
        layouts = [self.by_path[self.paths[key[0]]].layout for key in point.keys]
        moves = [self.leaves.move(key) for key in point.keys]
        sources = [op.source for op in point.meetings]
        plan = planned(point.blocks, point.keys, problems, layouts, sources, placement)
        lanes, fit = enter(plan, self.stream, self.masks)
        key = site_key(self.options.key, point.block)
        leaves = self.stream.current_leaves(point.blocks[0].segment)
        solved, bad = solve_block(plan, problems, leaves, moves, lanes, key)
        check(problems, solved, f"the output of {point.block}", bad)
        remark = "" if fit else MASK_UNFIT.format("the block's output")
        seconds = (time.perf_counter() - start) / len(problems)
        for at, problem, each, move in zip(point.keys, problems, solved, moves):
            self.keep(at, problem, each, seconds, remark, move)

    def problem(self, key: LeafKey, op: Any) -> Problem:
        """One site's weights and method."""
        job = self.by_path[self.paths[key[0]]]
        w = job.layout.to_matrix(self.leaves.inner(key))
        repairs = tuple(self.repairs.get(self.name(key), ()))
        return Problem(self.name(key), w, self.step(key), repairs, job.dtype)

    def coded(self, key: LeafKey) -> bool:
        """Whether any site of the leaf codes its input: lookups do not."""
        kinds = {op.call.kind for _, op in self.lanes[0].meetings if key_of(op) == key}
        return kinds != {"embedding"}

    def observe(self, point: Point, statistics: Any, move: Any) -> tuple[Seen, str]:
        """What is accumulated of the point's input over all batches."""
        op = point.meetings[0]
        seen = self.accumulator.init(statistics, op)
        remark = refusal(op)
        if remark:
            return seen, remark
        apart = self.apart(point) if Cross() in statistics.values() else ""
        unfit = ""
        for number, op, x, full, rest in self.stream.inputs(point):
            full = x if apart else full
            mask, fits = self.marks.take(number, op, x, rest)
            unfit = unfit if fits else MASK_UNFIT.format("the tokens here")
            seen = self.accumulator.update(
                statistics, op, seen, x, full, rest, mask, move
            )
        remarks = unfit, UNPAIRED.format(apart) if apart else ""
        return seen, "; ".join(filter(None, remarks))

    def apart(self, point: Point) -> str:
        """What keeps the rows of experts from being paired; empty if they are."""
        if point.meetings[0].call.kind != "ragged_dot":
            return ""
        places = zip(self.lanes, point.places)
        found = (unpaired(lane.tape, place) for lane, (place, _) in places)
        return next(filter(None, found), "")

    def keep(
        self, key: LeafKey, problem: Problem, each: Any, seconds: float, remark: str,
        move: Any,
    ) -> None:  # fmt: skip
        """Put the solved weights in the stream, and a row in the report."""
        path = self.paths[key[0]]
        job = self.by_path[path]
        solved = each.solved if move is None else replace(each.solved, t_in=move)
        self.stream.solved[key] = tensor_of(
            solved, job.layout, job.dtype, problem.method
        )
        first = self.layer(key) * job.slices_per_layer
        count = job.slices_per_layer
        lead = problem.w.shape[:-2]
        whole = replace(solved, t_in=_widened(move, lead))
        flat = jax.tree.map(lambda x: x.reshape(count, *x.shape[len(lead) :]), whole)
        errors = each.numbers["weight_error"].reshape(-1)
        norms = each.numbers["weight_norm"].reshape(-1)
        for i in range(count):
            self.pieces[path][first + i] = Piece(
                flat, i, seconds / count, float(errors[i]), float(norms[i])
            )
        self.advance(count * job.layout.K * job.layout.N)
        self.reports.append(site_report(problem, each, seconds, remark))

    def solve_unreached(self) -> None:
        """Sites inside control flow that the pass does not open: without data."""
        for job in self.jobs:
            missing = [i for i in job.wanted() if i not in self.pieces[job.path]]
            layers = dict.fromkeys(i // job.slices_per_layer for i in missing)
            sizes = job.shape[: len(job.shape) - len(job.layout.roles)]
            for layer in layers:
                index = tuple(int(i) for i in np.unravel_index(layer, sizes))
                self.solve_alone((self.paths.index(job.path), index))

    def solve_alone(self, key: LeafKey) -> None:
        """A site whose input was not seen."""
        start = time.perf_counter()
        problem = self.problem(key, None)
        statistics = statistics_of([problem])
        lead = problem.w.shape[:-2]
        states = {
            name: jax.tree.map(
                lambda x: jnp.broadcast_to(x, (*lead, *x.shape)),
                each.init(problem.w.shape[-2]),
            )
            for name, each in statistics.items()
        }
        seen = Seen(states, jnp.zeros(lead), jnp.zeros(lead))
        each = solve_sites(
            [problem], statistics, seen, self.options.key, self.options.placement
        )[0]
        check([problem], [each])
        check_ranges([problem], [each], [True])
        seconds = time.perf_counter() - start
        where = dict(self.lanes[0].tape.closed).get(key[0])
        remark = f"inside {where}, which is not opened" if where else "not reached"
        self.keep(key, problem, each, seconds, remark, self.leaves.move(key))


def _drifts(step: Any) -> bool:
    """Whether a step compares rows of the two streams."""
    return Cross() in getattr(step, "statistics", {}).values()


def _widened(move: Any, lead: tuple[int, ...]) -> Any:
    """A transform that all experts share, once for each."""
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (*lead, *x.shape)), move)
