"""One pass over a program with all calibration batches in flight.

The program stops at every *point*: sites that read one activation, before any of them
has run. The caller takes statistics of that activation, puts quantized weights in
place, and the pass goes on with them, so that every site sees inputs made by its
quantized predecessors. A second stream can run beside, with the float weights.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.core.qtensor import QTensor, Stacked
from qjax.trace.free import on_host
from qjax.trace.liveness import LeafKey, last_uses, leaf_reads, overlap
from qjax.trace.paired import decides, run_pair
from qjax.trace.program import Program
from qjax.trace.regions import Visitor, stacked
from qjax.trace.segments import Programs, Segment, cut
from qjax.trace.tape import Meeting, Op, Region, Tape
from qjax.trace.writer import write_tape


@dataclass(frozen=True, eq=False)
class Lane:
    """Batches of one shape, and the program that was traced for that shape."""

    program: Program
    tape: Tape
    batches: tuple[int, ...]

    @property
    def meetings(self) -> list[tuple[int, Meeting]]:
        """Where on the tape a weight meets an activation."""
        return self.tape.places


@dataclass(frozen=True, eq=False)
class Point:
    """Sites that read one activation.

    Attributes:
      keys: the layers of leaves.
      names: their names, `layers/3/attn/q_proj/kernel`.
      places: for every lane, the meetings and the position on its tape.
      inside: the control flow that holds the sites, "while"; empty on the tape itself.
      blocks: for every lane, the block that begins here and whose sites are solved
        together; empty where the sites share an input.
    """

    keys: tuple[LeafKey, ...]
    names: tuple[str, ...]
    places: tuple[tuple[int, tuple[Meeting, ...]], ...]
    inside: str = ""
    blocks: tuple[Any, ...] = ()

    @property
    def block(self) -> str:
        """The block that the sites are in: `layers/3`."""
        return block_of(self.names[0])

    @property
    def meetings(self) -> tuple[Meeting, ...]:
        """The meetings as the first lane has them."""
        return self.places[0][1]


def block_of(name: str) -> str:
    """`layers/3` of `layers/3/attn/q_proj/kernel`; a path without number is its own.

    >>> block_of("layers/3/attn/q_proj/kernel"), block_of("head/kernel")
    ('layers/3', 'head/kernel')
    """
    parts = name.split("/")
    number = next((i for i, p in enumerate(parts) if p.isdigit()), len(parts) - 1)
    return "/".join(parts[: number + 1])


def numbered_block(name: str) -> str:
    """`layers/3` of `layers/3/attn/q_proj/kernel`; empty for a path without number.

    >>> numbered_block("layers/3/attn/q_proj/kernel"), numbered_block("head/kernel")
    ('layers/3', '')
    """
    block = block_of(name)
    return block if block.rsplit("/", 1)[-1].isdigit() else ""


def lanes_of(trace: Callable[[Any], Program], batches: Sequence[Any]) -> list[Lane]:
    """One lane for each shape of batch, in order of first appearance."""
    groups: dict[Any, list[int]] = {}
    for number, batch in enumerate(batches):
        leaves, tree = jax.tree.flatten(batch)
        shapes = tuple((np.shape(x), str(getattr(x, "dtype", x))) for x in leaves)
        groups.setdefault((tree, shapes), []).append(number)
    lanes = []
    for numbers in groups.values():
        program = trace(batches[numbers[0]])
        lanes.append(Lane(program, write_tape(program), tuple(numbers)))
    return lanes


def find_points(
    lanes: Sequence[Lane],
    wanted: Callable[[LeafKey], bool],
    name: Callable[[LeafKey], str],
    repeated: bool = False,
) -> list[Point]:
    """The points of a program, in order.

    Args:
      lanes: the program for every shape of batch.
      wanted: which layers of leaves stop the pass.
      name: of a layer of a leaf.
      repeated: whether a leaf that is read several times stops the pass every time; a
        leaf that is to be solved stops it the first time, before anything has read it.

    Raises:
      ValueError: the program has other sites for another shape of batch.
    """
    found = [_points(lane, wanted, name, repeated) for lane in lanes]
    orders = [[keys for keys, _, _ in points] for points in found]
    if any(order != orders[0] for order in orders[1:]):
        raise ValueError(
            "the function meets its parameters in another order for batches of another "
            "shape; calibrate with batches of one shape"
        )
    return [
        Point(
            same[0][0],
            tuple(name(key) for key in same[0][0]),
            tuple((start, meetings) for _, start, meetings in same),
            _inside(lanes[0].tape.ops[same[0][1]]),
        )
        for same in zip(*found)
    ]


def _inside(op: Op) -> str:
    return op.kind if isinstance(op, Region) else ""


def _points(
    lane: Lane, wanted: Any, name: Any, repeated: bool
) -> list[tuple[Any, int, Any]]:
    groups: dict[Any, list[tuple[int, Meeting]]] = {}
    taken: set[LeafKey] = set()
    for place, op in lane.meetings:
        key = key_of(op)
        if not wanted(key) or (key in taken and not repeated):
            continue
        taken.add(key)
        group = op.source, numbered_block(name(key)), op.call.kind
        groups.setdefault(group, []).append((place, op))
    return [
        (tuple(key_of(op) for _, op in group), group[0][0], tuple(o for _, o in group))
        for group in groups.values()
    ]


def key_of(op: Meeting) -> LeafKey:
    """The layer of the leaf that an operation reads."""
    return op.weight.leaf, op.weight.index


@dataclass
class Stream:
    """The pass: where it is, and every value that is still needed.

    Attributes:
      lanes: the program for every shape of batch.
      points: where it stops.
      read: the float layer of a leaf.
      full: whether the full-precision stream runs too.
      paired: whether that stream moves its rows as the quantized one does.
      offload: whether activations wait on the host.
      programs: compiled segments.
      solved: quantized layers of leaves, used in place of the float ones.
    """

    lanes: Sequence[Lane]
    points: Sequence[Point]
    read: Callable[[LeafKey], Any]
    full: bool = False
    paired: bool = False
    offload: bool = False
    programs: Programs = field(default_factory=Programs)
    solved: dict[LeafKey, Any] = field(default_factory=dict)

    def start(
        self, batches: Sequence[Any], kept: Sequence[dict[int, int]] = ()
    ) -> None:
        """Take the batches: for each, the arrays of `f`'s inputs.

        Values that are `kept`, for each lane up to a place, are there at that place.
        """
        self.at = 0
        self.places = [0 for _ in self.lanes]
        self.values = [
            [dict(zip(lane.tape.inputs, batches[b])) for b in lane.batches]
            for lane in self.lanes
        ]
        self.last = [last_uses(lane.tape) for lane in self.lanes]
        for last, places in zip(self.last, kept):
            last |= {v: max(last.get(v, -1), p) for v, p in places.items()}
        self.leaf_reads = [leaf_reads(lane.tape) for lane in self.lanes]
        for last, lane in zip(self.last, self.values):
            for env in lane:
                for v in [v for v in env if last[v] < 0]:
                    del env[v]
        self.full_values = [[dict(v) for v in lane] for lane in self.values]

    def __iter__(self) -> Iterator[Point]:
        """Go from point to point; put the solved weights in `solved` before the next.

        After the last point the rest of the program is left; `finish` runs it.
        """
        while self.at < len(self.points):
            point = self.points[self.at]
            self.advance([start for start, _ in point.places])
            yield point
            self.at += 1

    def live(self) -> dict[str, Any]:
        """Where the pass is and what it holds, as a tree of arrays."""
        return {
            "at": self.at,
            "places": list(self.places),
            "values": self.values,
            "full": self.full_values if self.full else [],
        }

    def resume(self, live: dict[str, Any]) -> None:
        """Go on from what `live` gave; `solved` must hold what was solved before."""
        self.at, self.places = int(live["at"]), [int(p) for p in live["places"]]
        self.values = live["values"]
        self.full_values = live["full"] if self.full else self.full_values

    def finish(self) -> list[list[Any]]:
        """Run to the end; the outputs for each batch, in the batches' order."""
        self.advance([len(lane.tape.ops) for lane in self.lanes])
        return self._outputs(self.values)

    def _outputs(self, values: Any) -> list[list[Any]]:
        found: dict[int, list[Any]] = {}
        for lane, each in zip(self.lanes, values):
            for number, env in zip(lane.batches, each):
                found[number] = [
                    self._value(lane.tape, env, x) for x in lane.tape.outputs
                ]
        return [found[i] for i in sorted(found)]

    def advance(self, stops: Sequence[int]) -> None:
        """Run every lane up to a position on its tape."""
        for number, stop in enumerate(stops):
            seams = self.lanes[number].tape.seams
            for place in (*sorted(s for s in seams if s < stop), stop):
                if place > self.places[number]:
                    self._advance(number, self.places[number], place)
                    self.places[number] = place
        self._drop_solved()

    def _drop_solved(self) -> None:
        """Forget solved layers that no lane reads again; the caller has them."""
        read_later = [
            key
            for reads, place in zip(self.leaf_reads, self.places)
            for key, last in reads.items()
            if last >= place
        ]
        for key in list(self.solved):
            if not any(overlap(key, other) for other in read_later):
                del self.solved[key]

    def _advance(self, number: int, start: int, stop: int) -> None:
        lane, last = self.lanes[number], self.last[number]
        made = [out for op in lane.tape.ops[start:stop] for out in op.outs]
        wanted = [v for v in made if last[v] >= stop and v not in lane.tape.free]
        segment = cut(lane.tape, start, stop, wanted)
        streams = [(self.values[number], self.current_leaves(segment))]
        if self.full:
            streams.append((self.full_values[number], self.float_leaves(segment)))
        if self.full and self.paired and segment.outs and decides(segment.ops):
            self._run_pair(lane, segment, streams, stop, last)
            return
        for values, leaves in streams:
            self._run(lane, segment, values, leaves, stop, last)

    def current_leaves(self, segment: Segment) -> list[Any]:
        """The layers of leaves that a stretch reads, as they now are."""
        return [settled(self._leaf(key)) for key in segment.leaves]

    def _leaf(self, key: LeafKey) -> Any:
        """A layer of a leaf as it now is, also where only a part of it is solved."""
        leaf, index = key
        for stop in range(len(index), -1, -1):
            whole = self.solved.get((leaf, index[:stop]))
            if whole is not None:
                return whole[index[stop:]] if index[stop:] else whole
        inside = [
            (of, k[len(index) :])
            for (of, k) in self.solved
            if of == leaf and k[: len(index)] == index
        ]
        layer = self.read(key)
        for _, place in inside:
            solved = self.solved[leaf, (*index, *place)]
            layer = jnp.asarray(layer).at[place].set(solved.dequantize())
        return layer

    def _run(
        self, lane: Lane, segment: Segment, values: Any, leaves: Any, stop: int,
        last: dict[int, int],
    ) -> None:  # fmt: skip
        constants = [lane.tape.constants[c] for c in segment.constants]
        for env in values:
            ins = [env[v] for v in segment.ins]
            outs = self.programs.run(lane.tape, segment, leaves, constants, ins)
            self._take(segment, env, outs, stop, last)

    def _run_pair(
        self, lane: Lane, segment: Segment, streams: Any, stop: int,
        last: dict[int, int],
    ) -> None:  # fmt: skip
        values, leaves = zip(*streams)
        constants = [lane.tape.constants[c] for c in segment.constants]
        for envs in zip(*values):
            ins = [[env[v] for v in segment.ins] for env in envs]
            pair = run_pair(self.programs, lane.tape, segment, leaves, constants, ins)
            for env, outs in zip(envs, pair):
                self._take(segment, env, outs, stop, last)

    def _take(
        self, segment: Segment, env: dict[int, Any], outs: Sequence[Any], stop: int,
        last: dict[int, int],
    ) -> None:  # fmt: skip
        if self.offload:
            outs = [on_host(x) for x in outs]
        for v in [v for v in env if last[v] < stop]:
            del env[v]
        env |= dict(zip(segment.outs, outs))

    def inputs(self, point: Point) -> Iterator[tuple[int, Meeting, Any, Any, Any]]:
        """For each batch: number, meeting, activation, full-precision one, operands.

        The activation is as the equation reads it; `operands` are the other operands
        (group sizes of a ragged dot), None for the weight. A site inside control flow
        gives its activations of several visits at once, stacked along a new first axis;
        nothing, if a batch does not come by. Of visits that only one of the two streams
        makes there is nothing either.
        """
        for n, (lane, (place, meetings)) in enumerate(zip(self.lanes, point.places)):
            meeting, op = meetings[0], lane.tape.ops[place]
            streams = [(self.values[n], self._visitor(self.current_leaves, meeting))]
            if self.full:
                visitor = self._visitor(self.float_leaves, meeting)
                streams.append((self.full_values[n], visitor))
            for i, number in enumerate(lane.batches):
                seen = [v.seen(lane.tape, op, values[i]) for values, v in streams]
                count = min(map(len, seen))
                if isinstance(op, Region):
                    seen = [list(stacked(visits[:count])) for visits in seen]
                for pair in zip(*seen):
                    x, *full = (rest[meeting.call.operand] for rest in pair)
                    yield number, meeting, x, full[0] if full else None, pair[0]

    def float_leaves(self, segment: Segment) -> list[Any]:
        """The layers of leaves that a stretch reads, in float."""
        return [settled(self.read(key)) for key in segment.leaves]

    def _visitor(self, leaves: Any, meeting: Any) -> Visitor:
        return Visitor(self.programs, leaves, meeting)

    def _value(self, tape: Tape, env: dict[int, Any], x: Any) -> Any:
        return self._visitor(self.current_leaves, None).value(tape, env, x)


def settled(leaf: Any) -> Any:
    """A solved layer as its site needs it: an array unless more than the weight counts.

    Decoding once is cheaper than decoding for every batch, and gives the same numbers.
    """
    if isinstance(leaf, Stacked):
        return leaf.dequantize()
    if not isinstance(leaf, QTensor):
        return leaf
    acts = any(a.activation is not None for a in leaf.acts)
    return leaf if acts or leaf.bias is not None else _decode(leaf)


@jax.jit
def _decode(leaf: Any) -> Any:
    return leaf.dequantize()
