"""Where on a tape each value, and each layer of a leaf, is read for the last time."""

from qjax.trace.tape import Tape

LeafKey = tuple[int, tuple[int, ...]]
"""A layer of a leaf: the leaf's number, and layer numbers of its leading axes."""


def leaf_reads(tape: Tape) -> dict[LeafKey, int]:
    """The place of the last operation that reads each layer of each leaf."""
    found: dict[LeafKey, int] = {}
    for i, read in enumerate((*(op.ins for op in tape.ops), tape.outputs)):
        for x in read:
            weight = tape.weights.get(x) if isinstance(x, int) else None
            if weight is not None:
                found[weight.leaf, weight.index] = i
    return found


def overlap(a: LeafKey, b: LeafKey) -> bool:
    """Whether two keys share a part of a leaf."""
    return a[0] == b[0] and all(x == y for x, y in zip(a[1], b[1]))


def last_uses(tape: Tape) -> dict[int, int]:
    """The place of the last operation that reads each value; -1 where none does."""
    last = dict.fromkeys(tape.avals, -1)
    for i, op in enumerate(tape.ops):
        last |= {x: i for x in op.ins if isinstance(x, int)}
    return last | {x: len(tape.ops) for x in tape.outputs if isinstance(x, int)}
