"""Blocks: the stretch of a program from the first to the last use of `layers/i`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import jax.numpy as jnp
import numpy as np

from qjax.trace.liveness import LeafKey, last_uses
from qjax.trace.segments import Segment, evaluate, live
from qjax.trace.stream import Lane, Point, block_of
from qjax.trace.tape import Meeting, Op, Tape

Span = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Block:
    """One block as a function `block(leaves, live_in) -> live_out`.

    It is pure and differentiable in both; blocks with equal `segment.key` and shapes
    may share a compiled program.

    Attributes:
      name: `layers/3`.
      tape: the program that it is a part of.
      start, stop: its place on the tape.
      segment: what it reads and gives.
    """

    name: str
    tape: Tape
    start: int
    stop: int
    segment: Segment

    @property
    def leaves(self) -> tuple[LeafKey, ...]:
        """The layers of leaves that it reads, in the order of the argument."""
        return self.segment.leaves

    @property
    def live_in(self) -> tuple[int, ...]:
        """The values that it reads, in the order of the argument."""
        return self.segment.ins

    @property
    def live_out(self) -> tuple[int, ...]:
        """The values that later operations read, in the order of the result."""
        return self.segment.outs

    def __call__(self, leaves: Sequence[Any], live_in: Sequence[Any]) -> list[Any]:
        """The live-out values; a leaf may be an array or a QTensor."""
        return evaluate(self.tape, self.segment, leaves, self.constants, live_in)

    @property
    def constants(self) -> list[Any]:
        """The captured arrays that it reads."""
        return [self.tape.constants[c] for c in self.segment.constants]

    def made_from(self, keys: Sequence[LeafKey]) -> tuple[bool, ...]:
        """Which live-out values are arrays of reals that depend on these leaves."""
        numbers = [
            n for n, w in self.tape.weights.items() if (w.leaf, w.index) in set(keys)
        ]
        derived = set(numbers)
        for op in self.segment.ops:
            if any(isinstance(x, int) and x in derived for x in op.ins):
                derived |= set(op.outs)
        avals = [self.tape.avals[v] for v in self.live_out]
        return tuple(
            v in derived and a.ndim > 0 and jnp.issubdtype(a.dtype, jnp.floating)
            for v, a in zip(self.live_out, avals)
        )


def find_blocks(tape: Tape, name: Callable[[LeafKey], str]) -> tuple[Block, ...]:
    """The blocks of a program in order; what lies between them belongs to none.

    Args:
      tape: the program.
      name: of a layer of a leaf, `layers/3/attn/q_proj/kernel`.
    """
    spans = spans_of(tape, name, lambda block: block.rsplit("/", 1)[-1].isdigit())
    return tuple(
        Block(block, tape, start, stop, live(tape, start, stop))
        for block, (start, stop) in spans.items()
    )


def spans_of(
    tape: Tape, name: Callable[[LeafKey], str], wanted: Callable[[str], bool]
) -> dict[str, Span]:
    """From the first to behind the last use of the leaves of each block."""
    spans: dict[str, Span] = {}
    for place, op in enumerate(tape.ops):
        for key in leaves_of(tape, op):
            block = block_of(name(key))
            if wanted(block):
                first, _ = spans.get(block, (place, place))
                spans[block] = first, place + 1
    return spans


def whole_blocks(tape: Tape, spans: Mapping[str, Span]) -> dict[str, Block]:
    """Blocks with what belongs to them before their first leaf and behind their last.

    A block ends where the least is carried on before another leaf is read (behind a
    residual addition, not in front of it), and begins likewise. Only what comes from a
    leaf or from an input of real numbers counts: masks and positions pass by.

    Args:
      tape: the program.
      spans: first and last use of each block, as `spans_of` gives them.

    Raises:
      ValueError: two blocks share a stretch of the program.
    """
    carried, found = _carried(tape), dict[str, Block]()
    reads = [i for i, op in enumerate(tape.ops) if leaves_of(tape, op)]
    done, before = 0, ""
    for name, (first, end) in sorted(spans.items(), key=lambda pair: pair[1]):
        if first < done:
            raise ValueError(
                f"{name} is read before {before} is finished, so that neither is a "
                "block of its own; take a method that solves single sites, or leave "
                "one of them out with ignore"
            )
        low = max(done, *(r + 1 for r in reads if r < first), 0)
        low = max(low, *(s for s in tape.seams if s <= first), 0)
        high = min(len(tape.ops), *(r for r in reads if r >= end), len(tape.ops))
        high = min(high, *(s for s in tape.seams if s >= end), high)
        start = min(range(low, first + 1), key=lambda p: (carried[p], -p))
        stop = min(range(end, high + 1), key=lambda p: (carried[p], p))
        found[name] = Block(name, tape, start, stop, live(tape, start, stop))
        done, before = stop, name
    return found


def _carried(tape: Tape) -> np.ndarray:
    """At each place, bytes that leaves and inputs gave and that are read from there."""
    last, change = last_uses(tape), np.zeros(len(tape.ops) + 2, np.int64)
    derived: set[int] = set()

    def carry(value: int, start: int) -> None:
        aval = tape.avals[value]
        size = prod(aval.shape) * aval.dtype.itemsize
        derived.add(value)
        change[start] += size
        change[max(last[value] + 1, start)] -= size

    for v in tape.inputs:
        if jnp.issubdtype(tape.avals[v].dtype, jnp.floating):
            carry(v, 0)
    for place, op in enumerate(tape.ops):
        reads = [x for x in op.ins if isinstance(x, int)]
        if any(x in tape.weights or x in derived for x in reads):
            for out in op.outs:
                carry(out, place + 1)
    return np.cumsum(change)


def block_points(
    lanes: Sequence[Lane],
    wanted: Callable[[LeafKey], bool],
    name: Callable[[LeafKey], str],
) -> list[Point]:
    """A point in front of each block whose sites are solved together.

    Args:
      lanes: the program for every shape of batch.
      wanted: which layers of leaves are solved with their block.
      name: of a layer of any leaf.

    Raises:
      ValueError: the blocks overlap, or are others for another shape of batch.
    """
    found = [_points_of(lane, wanted, name) for lane in lanes]
    orders = [[(block.name, keys) for block, keys, _ in each] for each in found]
    if any(order != orders[0] for order in orders[1:]):
        raise ValueError(
            "the blocks of the function are others for batches of another shape; "
            "calibrate with batches of one shape"
        )
    return [
        Point(
            same[0][1],
            tuple(name(key) for key in same[0][1]),
            tuple((block.start, meetings) for block, _, meetings in same),
            blocks=tuple(block for block, _, _ in same),
        )
        for same in zip(*found)
    ]


def _points_of(lane: Lane, wanted: Any, name: Any) -> list[tuple[Block, Any, Any]]:
    groups: dict[str, dict[LeafKey, Meeting]] = {}
    for _, op in lane.meetings:
        key = op.weight.leaf, op.weight.index
        if wanted(key):
            groups.setdefault(block_of(name(key)), {}).setdefault(key, op)
    blocks = whole_blocks(lane.tape, spans_of(lane.tape, name, groups.__contains__))
    return [
        (blocks[each], tuple(groups[each]), tuple(groups[each].values()))
        for each in blocks
    ]


def leaves_of(tape: Tape, op: Op) -> list[LeafKey]:
    """The layers of leaves that an operation reads."""
    weights = (tape.weights.get(x) for x in op.ins if isinstance(x, int))
    return [(w.leaf, w.index) for w in weights if w is not None]
