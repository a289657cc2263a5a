"""Blocks: the stretch of a program from the first to the last use of `layers/i`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from qjax.trace.segments import Segment, evaluate, live
from qjax.trace.stream import LeafKey, block_of
from qjax.trace.tape import Op, Tape


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
        constants = [self.tape.constants[c] for c in self.segment.constants]
        return evaluate(self.tape, self.segment, leaves, constants, live_in)


def find_blocks(tape: Tape, name: Callable[[LeafKey], str]) -> tuple[Block, ...]:
    """The blocks of a program in order; what lies between them belongs to none.

    Args:
      tape: the program.
      name: of a layer of a leaf, `layers/3/attn/q_proj/kernel`.
    """
    spans: dict[str, tuple[int, int]] = {}
    for place, op in enumerate(tape.ops):
        for key in leaves_of(tape, op):
            block = block_of(name(key))
            if not block.rsplit("/", 1)[-1].isdigit():
                continue
            first, _ = spans.get(block, (place, place))
            spans[block] = first, place + 1
    return tuple(
        Block(block, tape, start, stop, live(tape, start, stop))
        for block, (start, stop) in spans.items()
    )


def leaves_of(tape: Tape, op: Op) -> list[LeafKey]:
    """The layers of leaves that an operation reads."""
    weights = (tape.weights.get(x) for x in op.ins if isinstance(x, int))
    return [(w.leaf, w.index) for w in weights if w is not None]
