"""Which rows of an expert's input are padding.

Where tokens are sorted by expert and repeated for each expert that sees them, the axes
that a mask speaks of are gone. So the rows are looked for: the way from the last value
that has the mask's axes to the experts' input is gone again with the rows of padded
tokens NaN, and what comes out NaN is a row of padding. Rows move as they moved in the
pass: whole numbers are those that the pass has, and what is sorted on the way is sorted
by actual values (`qjax.trace.paired`). Two things are checked, and rows that fail are
not known: without marks the way leads to the input that the pass has, and every token
comes out equally often, so that tokens were neither mixed nor dropped.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.trace.paired import run_pair
from qjax.trace.rows import mask_fits
from qjax.trace.segments import Segment, stretch
from qjax.trace.stream import Stream
from qjax.trace.tape import Meeting, Region, Tape

NEAR = 0.02  # of the largest value of a row: twice the spacing of bfloat16 and more
NOT_KNOWN = np.zeros(0, np.float32)


@dataclass(frozen=True, eq=False)
class Way:
    """From tokens to the rows that experts see.

    Attributes:
      tokens: the value whose leading axes are those of the mask, in full or as one.
      segment: what makes the experts' input of it, and of what is no real number.
      data: the values of reals that the experts' input is made of.
    """

    tokens: int
    segment: Segment
    data: frozenset[int]


def way_to(tape: Tape, op: Meeting, shape: tuple[int, ...]) -> Way | None:
    """The shortest way to the input of experts; None if there is none.

    It begins where both the rows and the sizes of their groups come from: what lies
    behind the routing has rows of its own.

    Args:
      tape: the program.
      op: a `ragged_dot`.
      shape: of the mask.
    """
    made = {out: i for i, each in enumerate(tape.ops) for out in each.outs}
    x, sizes = op.x, op.ins[2]
    if not isinstance(x, int) or not isinstance(sizes, int):
        return None

    def real(v: int) -> bool:
        return jnp.issubdtype(tape.avals[v].dtype, jnp.inexact)

    def moves(v: int) -> bool:
        fixed = v in tape.weights or v in tape.constants or v in tape.free
        return not fixed and aligned(tape.avals[v].shape, shape)

    data = _sources(tape, made, x, real)
    both = data & _sources(tape, made, sizes, lambda v: True)
    tokens = max(filter(moves, both - {x}), key=lambda v: made.get(v, -1), default=None)
    if tokens is None:
        return None
    born = made.get(tokens, -1)

    def behind(v: int) -> bool:
        return v in tape.free or (real(v) and made.get(v, -1) > born)

    inner = _sources(tape, made, x, behind)
    places = sorted({made[v] for v in inner if v in made})
    segment = stretch(tape, [tape.ops[i] for i in places], [x])
    return Way(tokens, segment, frozenset(data))


def _sources(
    tape: Tape, made: dict[int, int], value: int, wanted: Callable[[int], bool]
) -> set[int]:
    """The value and all that it is made of, as far as is wanted."""
    found, open_ = {value}, [value]
    while open_:
        place = made.get(open_.pop())
        reads = () if place is None else tape.ops[place].ins
        new = {v for v in reads if isinstance(v, int) and v not in found and wanted(v)}
        found |= new
        open_ += new
    return found


def aligned(shape: Sequence[int], mask: tuple[int, ...]) -> bool:
    """Whether the leading axes of a value are the mask's, or all of them in one.

    >>> aligned((2, 4, 8), (2, 4)), aligned((8, 8), (2, 4)), aligned((4, 2, 8), (2, 4))
    (True, True, False)
    """
    whole = len(shape) > len(mask) and tuple(shape[: len(mask)]) == mask
    return whole or (len(shape) > 1 and shape[0] == prod(mask))


@dataclass
class Marks:
    """Token weights of a pass, as every site sees its tokens.

    Weights of rows are kept among the values of the stream for the sites that follow.

    Attributes:
      stream: the pass, before it starts.
      masks: token weights of every batch, or None.
      ways: for the first site of those that have the same rows, its lane and its way.
      kept: for each lane, values that the stream must keep, and up to which place.
    """

    stream: Stream
    masks: Sequence[Any]
    ways: dict[Meeting, tuple[int, Way]] = field(default_factory=dict)
    kept: list[dict[int, int]] = field(default_factory=list)

    def __post_init__(self):
        self.rows: dict[Meeting, int] = {}
        self.where = {
            number: (n, i)
            for n, lane in enumerate(self.stream.lanes)
            for i, number in enumerate(lane.batches)
        }
        self.kept = [self._find(n) for n in range(len(self.stream.lanes))]

    def _find(self, n: int) -> dict[int, int]:
        """The ways of a lane; what they begin with must be there at their end."""
        lane, kept = self.stream.lanes[n], dict[int, int]()
        mask, before = self.masks[lane.batches[0]], list[tuple[Meeting, ...]]()
        if mask is None:
            return kept
        for point in self.stream.points:
            place, group = point.places[n]
            inside = point.blocks or isinstance(lane.tape.ops[place], Region)
            if inside or group[0].call.kind != "ragged_dot":
                continue
            way = way_to(lane.tape, group[0], tuple(mask.shape))
            if way is None:
                continue
            rows = self._followed(group[0], way, before)
            if rows is None:
                rows = ~place  # no value of the tape has a negative number
                self.ways[group[0]] = n, way
                kept |= dict.fromkeys(way.segment.ins, place)
            self.rows[group[0]] = rows
            kept[rows] = place
            before.append(group)
        return kept

    def _followed(
        self, op: Meeting, way: Way, before: Iterable[Sequence[Meeting]]
    ) -> int | None:
        """The rows of an earlier site, of whose output these are made."""
        for group in before:
            same = group[0].ins[2] == op.ins[2]
            if same and any(out in way.data for each in group for out in each.outs):
                return self.rows[group[0]]
        return None

    def take(self, number: int, op: Meeting, x: Any, rest: Any) -> tuple[Any, bool]:
        """Weights of the tokens that a site sees, or None; and whether that is right.

        Args:
          number: of the batch.
          op: the site, the first of its point.
          x: its activation.
          rest: all operands of the equation, as `Stream.inputs` gives them.
        """
        mask = self.masks[number]
        if mask is None:
            return None, True
        if op.call.kind == "ragged_dot":
            weights = self._weights(number, op, x, rest[2])
            return (weights, True) if np.size(weights) else (None, False)
        fits = mask_fits(op, x, mask)
        return (mask if fits else None), fits

    def _weights(self, number: int, op: Meeting, x: Any, sizes: Any) -> Any:
        """Weights of the rows that experts see; empty where they are not known."""
        n, i = self.where[number]
        env = self.stream.values[n][i]
        if op in self.ways:
            found = self._found(np.asarray(self.masks[number]), op, env, x, sizes)
            env[self.rows[op]] = found
        return env[self.rows[op]] if op in self.rows else NOT_KNOWN

    def _found(
        self, mask: np.ndarray, op: Meeting, env: dict[int, Any], x: Any, sizes: Any
    ) -> Any:
        n, way = self.ways[op]
        if not aligned(env[way.tokens].shape, mask.shape):
            return NOT_KNOWN
        # Padding comes last, so that of two weights it is the one that is marked: what
        # is NaN there already is no harm.
        values, place, counts = np.unique(
            -mask.astype(np.float32), return_inverse=True, return_counts=True
        )
        place, bits = place.reshape(mask.shape), max(len(values) - 1, 1).bit_length()
        pairs = [self._marked(n, way, env, place >> b & 1) for b in range(bits)]
        marked = [each for _, each in pairs]
        code, seen, moved = _codes(pairs[0][0], marked, x, sizes, len(values))
        seen, rows = np.asarray(seen, np.int64), int(np.sum(np.asarray(sizes)))
        if int(moved) or np.any(seen * mask.size != counts * rows):
            return NOT_KNOWN
        return jnp.asarray(-values)[code]

    def _marked(
        self, n: int, way: Way, env: dict[int, Any], chosen: Any
    ) -> tuple[Any, Any]:
        """The experts' input, and with NaN in every row of the chosen tokens."""
        stream, segment = self.stream, way.segment
        tape = stream.lanes[n].tape
        x = env[way.tokens]
        whole = tuple(x.shape[: chosen.ndim]) == chosen.shape
        axes = chosen.shape if whole else (chosen.size,)
        chosen = chosen.reshape(*axes, *(1,) * (x.ndim - len(axes)))
        there = env | {way.tokens: jnp.where(chosen > 0, jnp.nan, x)}
        ins = [[each[v] for v in segment.ins] for each in (env, there)]
        # What is coded is never NaN, so that the marks go by the float leaves.
        leaves = stream.current_leaves(segment), stream.float_leaves(segment)
        constants = [tape.constants[c] for c in segment.constants]
        plain, marked = run_pair(stream.programs, tape, segment, leaves, constants, ins)
        return plain[0], marked[0]


@partial(jax.jit, static_argnums=4)
def _codes(
    plain: Any, marked: Sequence[Any], x: Any, sizes: Any, count: int
) -> tuple[Any, Any, Any]:
    """The number that each row is marked with, and how many rows of the groups have it.

    A number from `count` on is that of no token: rows that have it are not counted. The
    third result is how many rows without marks are not those of the pass.
    """
    bits = [jnp.isnan(y).any(-1).astype(jnp.int32) << b for b, y in enumerate(marked)]
    code = sum(bits[1:], bits[0])
    grouped = jnp.arange(len(code)) < jnp.sum(sizes)
    plain, x = plain.astype(jnp.float32), x.astype(jnp.float32)
    # Another program may round otherwise, but another token is another row.
    near = jnp.abs(plain - x) <= NEAR * jnp.abs(x).max(-1, keepdims=True)
    same = near | (plain == x) | (jnp.isnan(plain) & jnp.isnan(x))
    moved = jnp.sum(grouped & ~same.all(-1))
    return code, jnp.bincount(jnp.where(grouped, code, count), length=count), moved
