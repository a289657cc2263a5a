"""The sites of one block, solved together: gradient descent on the block's output.

A block is a pure function of its leaves and of what enters it. Its quantizable weights
pass through their method's `fake`, inputs of linears are coded where they will be, and
what the method learns is moved until the output on the quantized stream comes near to
the full-precision one. All steps are one
`lax.scan` in one compiled program, which blocks of equal structure share: parameters
and activations are its arguments.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.core.layout import Layout
from qjax.core.pytrees import register
from qjax.core.qtensor import SiteActs
from qjax.core.sweep import second_scale
from qjax.core.transforms import chained
from qjax.descent import descended
from qjax.placement import NOWHERE, Placement
from qjax.sitesolver import Problem, Result
from qjax.solving import Solved, solved_as_one, weight_error
from qjax.trace.blocks import Block
from qjax.trace.compat import holds
from qjax.trace.segments import CodingSite, evaluate
from qjax.trace.stream import Lane, LeafKey, Stream

ALIKE = ("iters", "batch_size", "quantized_input", "keep_best", "summed")


@dataclass(frozen=True)
class Piece:
    """A block of one lane as a static argument: equal where the program would be.

    Attributes:
      key: of its segment.
      leaves: the place of each of its leaves among those that are given.
      compared: which live-out values are compared.
      together: how many calibration batches make a step.
      apart: whether they run one after the other: JAX has no rule for `ragged_dot`s of
        several batches.
      block: what to run.
    """

    key: Any
    leaves: tuple[int, ...]
    compared: tuple[bool, ...]
    together: int
    apart: bool
    block: Block = field(compare=False, repr=False)

    def __call__(self, leaves: Sequence[Any], constants: Any, ins: Any) -> list[Any]:
        """The live-out values that are compared."""
        block, held = self.block, [leaves[i] for i in self.leaves]
        outs = evaluate(block.tape, block.segment, held, constants, ins)
        return [y for y, taken in zip(outs, self.compared) if taken]


@dataclass(frozen=True)
class Plan:
    """What one compiled program does.

    Attributes:
      pieces: the block in each lane.
      methods: of the sites, one for each.
      sites: for each, its place among the leaves, and its layout.
      groups: sites that are quantized side by side, as they share a second scale; by
        their numbers, every site in one.
      placement: the mesh.
    """

    pieces: tuple[Piece, ...]
    methods: tuple[Any, ...]
    sites: tuple[tuple[int, Layout], ...]
    groups: tuple[tuple[int, ...], ...]
    placement: Placement = NOWHERE


@dataclass(frozen=True, eq=False)
class Data:
    """What a lane gives a block: batches stacked along a new first axis.

    Attributes:
      constants: captured arrays, not stacked.
      ins: live-in values.
      targets: live-out values of the full-precision stream.
      weights: for each target the tokens' weights, or None.
    """

    constants: Any
    ins: Any
    targets: Any
    weights: Any

    @property
    def batches(self) -> int:
        """How many there are."""
        return self.targets[0].shape[0]

    def rows(self, chosen: Any = slice(None)) -> Any:
        """Live-in values, targets and weights of some batches."""
        return jax.tree.map(lambda x: x[chosen], (self.ins, self.targets, self.weights))


register(Data, ("constants", "ins", "targets", "weights"))


def planned(
    blocks: Sequence[Block],
    keys: Sequence[LeafKey],
    problems: Sequence[Problem],
    layouts: Sequence[Layout],
    sources: Sequence[Any],
    placement: Placement = NOWHERE,
) -> Plan:
    """How the sites `keys` of a block are solved; those of equal `sources` read alike.

    Raises:
        ValueError: methods that go through the data in different ways, a step that is
            to mend single sites, or a block whose output does not depend on its sites.
    """
    methods = tuple(problem.method for problem in problems)
    for name in ALIKE:
        values = {getattr(method, name): method for method in methods}
        if len(values) > 1:
            text = " and ".join(map(repr, values))
            raise ValueError(
                f"{blocks[0].name} has sites with {name} {text}; all sites of a block "
                "are solved together, so give them the same"
            )
    for problem in problems:
        if problem.repairs:
            raise ValueError(
                f"{type(problem.repairs[0]).__name__} cannot repair {problem.name}, "
                f"which {type(problem.method).__name__} solves with its whole block; "
                "leave it out with ignore"
            )
    first = blocks[0].leaves
    pieces = tuple(_piece(block, first, keys, methods[0]) for block in blocks)
    sites = zip((first.index(key) for key in keys), layouts)
    groups: dict[Any, list[int]] = {}
    for i, (problem, source) in enumerate(zip(problems, sources)):
        method = problem.method
        joined = second_scale(method.format) and solved_as_one(method)
        alike = (method, source, problem.w.shape[:-1], problem.w.dtype)
        groups.setdefault(alike if joined else i, []).append(i)
    together = tuple(map(tuple, groups.values()))
    return Plan(pieces, methods, tuple(sites), together, placement)


def _piece(
    block: Block, leaves: Sequence[LeafKey], keys: Sequence[LeafKey], method: Any
) -> Piece:
    compared = block.made_from(keys)
    if not any(compared) or set(block.leaves) != set(leaves):
        raise ValueError(
            f"nothing that later layers read of {block.name} depends on its weights; "
            "leave it out with ignore"
        )
    numbers = tuple(leaves.index(key) for key in block.leaves)
    shapes = [block.tape.avals[v].shape for v in block.tape.inputs]
    rows = next((shape[0] for shape in shapes if shape), 1)
    together = max(method.batch_size // max(rows, 1), 1)
    apart = any(holds(op.eqn, "ragged_dot_general") for op in block.segment.ops)
    return Piece(block.segment.key, numbers, compared, together, apart, block)


def enter(plan: Plan, stream: Stream, masks: Sequence[Any]) -> tuple[list[Data], bool]:
    """What every lane gives the block at which the stream stands.

    Args:
      plan: as `planned` gives it.
      stream: the pass, in front of the block.
      masks: token weights of every batch, or None.

    Returns:
      The data, and whether all masks fit the block's output.
    """
    values = zip(plan.pieces, stream.lanes, stream.values, stream.full_values)
    pairs = [_entered(plan, stream, masks, *each) for each in values]
    return [data for data, _ in pairs], all(fit for _, fit in pairs)


def _entered(
    plan: Plan,
    stream: Stream,
    masks: Any,
    piece: Piece,
    lane: Lane,
    low: Any,
    full: Any,
) -> tuple[Data, bool]:
    tape, segment = piece.block.tape, piece.block.segment
    leaves, constants = stream.float_leaves(segment), piece.block.constants
    targets = []
    for env in full:
        ins = [env[v] for v in segment.ins]
        outs = stream.programs.run(tape, segment, leaves, constants, ins)
        targets.append([y for y, taken in zip(outs, piece.compared) if taken])
    given = low if plan.methods[0].quantized_input else full
    ins = _stacked([[env[v] for v in segment.ins] for env in given])
    wanted = _stacked(targets)
    weights: list[Any] = [None] * len(wanted)
    if masks[lane.batches[0]] is not None:
        mask = _stacked([[masks[i]] for i in lane.batches])[0].astype(jnp.float32)
        weights = [_fitting(mask, y) for y in wanted]
        fit = all(weight is not None for weight in weights)
        return Data(constants, ins, wanted, weights), fit
    return Data(constants, ins, wanted, weights), True


def _stacked(batches: Sequence[Sequence[Any]]) -> list[Any]:
    return [jnp.stack([jnp.asarray(x) for x in each]) for each in zip(*batches)]


def _fitting(mask: Any, y: Any) -> Any:
    """Token weights as they multiply a value, or None where they are of other axes."""
    if mask.ndim >= y.ndim or mask.shape != y.shape[: mask.ndim]:
        return None
    return mask.reshape(*mask.shape, *(1,) * (y.ndim - mask.ndim))


def solve_block(
    plan: Plan,
    problems: Sequence[Problem],
    leaves: Sequence[Any],
    moves: Sequence[Any],
    lanes: Sequence[Data],
    key: Any,
) -> tuple[list[Result], int]:
    """The sites, solved; and how many values of the targets are not finite.

    Args:
      plan: as `planned` gives it.
      problems: the sites.
      leaves: all leaves of the block as they are, those to be solved included.
      moves: for each site the transform of its input, or None.
      lanes: the batches.
      key: for the choice of minibatches.
    """
    ws = [problem.w for problem in problems]
    found, numbers, whole = optimised(plan, leaves, ws, moves, lanes, key)
    numbers, whole = jax.device_get((numbers, whole))
    bad = int(whole.pop("bad"))
    return [
        Result(Solved(solution), {**own, **whole, "notes": {}}, "block")
        for solution, own in zip(found, numbers)
    ], bad


@partial(jax.jit, static_argnums=0)
def optimised(
    plan: Plan, leaves: Any, ws: Any, moves: Any, lanes: Sequence[Data], key: Any
) -> tuple[list[Any], list[dict[str, Any]], dict[str, Any]]:
    """Solutions, numbers of each site, and numbers of the block."""
    start = [m.init(w.astype(jnp.float32)) for m, w in zip(plan.methods, ws)]
    faked = partial(_faked, plan, leaves, ws, moves)
    errors = [partial(_mean, plan, lanes, number) for number in range(len(lanes))]
    batches = [(p.together, data.batches) for p, data in zip(plan.pieces, lanes)]
    learned = descended(plan.methods, start, faked, errors, batches, key)
    before = _whole(plan, faked(start, 1.0), lanes)
    after = _whole(plan, faked(learned, 1.0), lanes)
    found = _side_by_side(
        plan, ws, learned, lambda m, w, t: m.finish(w, t), lambda x, n: x.split(n)
    )
    numbers = [_numbers(w, each) for w, each in zip(ws, found)]
    whole = {**after, "error_before": before["error"]}
    return plan.placement.everywhere((found, numbers, whole))


def _numbers(w: Any, found: Any) -> dict[str, Any]:
    error, norm = weight_error(w, found)
    bad = jnp.sum(~jnp.isfinite(w))
    return {"weight_error": error, "weight_norm": norm, "bad_weights": bad}


def _faked(
    plan: Plan, leaves: Any, ws: Any, moves: Any, learned: Any, progress: Any
) -> list[Any]:
    """The leaves with the sites' weights, and inputs, as they would be quantized."""
    new = list(leaves)
    fakes = _side_by_side(
        plan, ws, learned, lambda m, w, t: m.fake(w, t, progress), _split
    )
    for i, method in enumerate(plan.methods):
        (place, layout), w = plan.sites[i], fakes[i]
        t_in, coded = chained(moves[i], method.moved(learned[i])), method.activation
        whole = w if t_in is None else t_in.left(w)
        inner, layer = (
            layout.from_matrix(each).astype(leaves[place].dtype) for each in (w, whole)
        )
        acts = SiteActs(t_in=t_in, activation=coded)
        inside = coded is not None and coded.outliers is None
        new[place] = CodingSite(inner, acts, layer) if inside else layer
    return new


def _side_by_side(
    plan: Plan, ws: Any, learned: Any, make: Callable[..., Any], split: Any
) -> list[Any]:
    """What `make(method, w, learned)` gives for each site, groups taken as one."""
    found: dict[int, Any] = {}
    for group in plan.groups:
        own = [(ws[i], learned[i]) for i in group]
        if len(group) == 1:
            found[group[0]] = make(plan.methods[group[0]], *own[0])
            continue
        whole = jax.tree.map(lambda *x: jnp.concatenate(x, axis=-1), *own)
        widths = [w.shape[-1] for w, _ in own]
        each = split(make(plan.methods[group[0]], *whole), widths)
        found |= dict(zip(group, each))
    return [found[i] for i in range(len(ws))]


def _split(w: Any, widths: Sequence[int]) -> list[Any]:
    return jnp.split(w, np.cumsum(widths)[:-1], axis=-1)


def _mean(
    plan: Plan, lanes: Sequence[Data], lane: int, leaves: Any, chosen: Any
) -> Any:
    """Mean squared error over the batches that were chosen of a lane.

    Of a method that is `summed`, over tokens, and the sum over features.
    """
    piece, data = plan.pieces[lane], lanes[lane]
    rows = data.rows(chosen[lane])
    one = partial(_sums, piece, leaves, data.constants)
    in_turn = partial(jax.lax.map, lambda row: one(*row))
    sums = in_turn(rows) if piece.apart else jax.vmap(one)(*rows)
    count = sums["tokens" if plan.methods[0].summed else "count"]
    return sums["error"].sum() / jnp.maximum(count.sum(), 1)


def _whole(plan: Plan, leaves: Any, lanes: Sequence[Data]) -> dict[str, Any]:
    """Sums over all batches, one after the other."""
    totals = []
    for piece, data in zip(plan.pieces, lanes):
        one = partial(_sums, piece, leaves, data.constants)
        sums = jax.lax.map(lambda row, one=one: one(*row), data.rows())
        totals.append(jax.tree.map(lambda x: x.sum(0), sums))
    return jax.tree.map(lambda *x: sum(x), *totals)


def _sums(
    piece: Piece, leaves: Any, constants: Any, ins: Any, targets: Any, weights: Any
) -> dict[str, Any]:
    """Of one batch: squared error and norm, how many values, tokens, and not finite."""
    outs = piece(leaves, constants, ins)
    sums = [_compared(*each) for each in zip(outs, targets, weights)]
    whole = jax.tree.map(lambda *x: sum(x), *sums)
    return {**whole, "tokens": sums[0]["tokens"]}


def _compared(y: Any, exact: Any, weight: Any) -> dict[str, Any]:
    rows, size = exact.shape[:-1], exact.shape[-1]
    weight = jnp.ones((*rows, 1)) if weight is None else weight
    weight = jnp.broadcast_to(weight, (*rows, 1))
    # Padding may hold anything; 0 times NaN is NaN.
    y, exact = (jnp.where(weight > 0, x.astype(jnp.float32), 0) for x in (y, exact))
    return {
        "error": jnp.sum(weight * jnp.square(y - exact)),
        "norm": jnp.sum(weight * jnp.square(exact)),
        "count": weight.sum() * size,
        "tokens": weight.sum(),
        "bad": jnp.sum(~jnp.isfinite(exact)),
    }
