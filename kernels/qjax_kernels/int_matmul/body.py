"""What one grid step of the TPU kernel does.

Scales go on the accumulator of each group (`scale_on="sums"`, exact products) or on the
weights (`"weights"`, rounded to bfloat16: cheaper for many tokens, whose int8 codes are
exact in bfloat16 too). Zero points are one
small product for each block of outputs, `sum_g xsum_g (zero scale)_g`, done once.
"""

from dataclasses import dataclass
from math import lcm
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from qjax_kernels import crossing
from qjax_kernels.int_matmul import decode
from qjax_kernels.int_matmul.blocks import LANES, TOKENS, Blocks, registers
from qjax_kernels.int_matmul.reference import quantize_tokens
from qjax_kernels.int_matmul.weight import IntWeight

LATE_CHUNK = 512  # inputs decoded at a time where nothing is done for each group


@dataclass(frozen=True)
class Plan:
    """Everything static that a kernel's body needs."""

    bits: int
    group: int
    groups: int
    steps: int
    blocks: Blocks
    zeros: bool
    int8_tokens: bool
    contract: Any
    scaled_in: Any = jnp.float32
    whole_tokens: bool = False

    @classmethod
    def of(
        cls,
        weight: IntWeight,
        blocks: Blocks,
        int8_tokens: bool,
        contract: Any,
        scaled_in: Any = jnp.float32,
        whole_tokens: bool = False,
    ) -> "Plan":
        """The plan for a weight.

        Args:
          weight: the coded weight.
          blocks: sizes of one grid step, fitted.
          int8_tokens: whether tokens are coded.
          contract: the dtype that the matrix unit takes.
          scaled_in: the dtype in which scales multiply weights, where they do.
          whole_tokens: whether a block of tokens has all inputs, not those of a step.
        """
        group = min(weight.group or weight.rows, weight.rows)
        return cls(
            bits=weight.bits,
            group=min(group, blocks.k),
            groups=weight.groups,
            steps=weight.rows // blocks.k,
            blocks=blocks,
            zeros=weight.zero is not None,
            int8_tokens=int8_tokens,
            contract=contract,
            scaled_in=scaled_in,
            whole_tokens=whole_tokens,
        )

    @property
    def chunk(self) -> int:
        """Inputs decoded at a time: whole groups and whole registers."""
        unit = lcm(1 if self.late else self.group, registers(self.bits))
        most = max(self.blocks.chunk or LATE_CHUNK * self.late, unit)
        sizes = range(most // unit * unit, 0, -unit)
        return next((c for c in sizes if self.blocks.k % c == 0), self.blocks.k)

    @property
    def mixed(self) -> bool:
        """Whether decoded rows of several groups lie between each other."""
        return self.bits == crossing.BITS and self.group < self.chunk and not self.late

    @property
    def late(self) -> bool:
        """Whether the one scale of an output is put on its finished sum."""
        return self.groups == 1

    @property
    def step_groups(self) -> int:
        """Groups of one step, the last of which may be cut."""
        return 1 if self.late else -(-self.blocks.k // self.group)

    @property
    def moving(self) -> bool:
        """Whether tokens take the order in which codes are decoded."""
        return self.blocks.decode == "offset"

    @property
    def summing(self) -> bool:
        """Whether sums of tokens over groups come with their new order."""
        lanes = self.group % LANES == 0 and self.bits != crossing.BITS
        return self.moving and lanes and not self.late

    @property
    def sums(self) -> bool:
        """Whether the sums of `x` over groups are needed beforehand."""
        return (self.zeros or self.moving) and not self.summing

    @property
    def moves(self) -> np.ndarray:
        """What puts tokens into the order of decoded codes, and beside it what sums."""
        moves = decode.moves(self.bits, self.chunk, self.blocks.k)
        ones = np.ones((moves.shape[0], LANES), bool)
        return np.concatenate([moves, ones], 1) if self.summing else moves

    @property
    def bias(self) -> int:
        """What decoding adds to every code `q`."""
        offset = self.blocks.decode == "offset"
        return decode.BIAS + 2 ** (self.bits - 1) if offset else 0


@dataclass(frozen=True)
class Refs:
    """The blocks and scratch of one grid step; None where the plan has none."""

    x: Any
    codes: Any
    scale: Any
    zero: Any
    x_sums: Any
    out: Any
    total: Any
    wide: Any
    x_codes: Any
    x_scale: Any
    lanes: Any = None
    moves: Any = None
    moved: Any = None
    moved_sums: Any = None
    away: Any = None

    @classmethod
    def of(cls, refs: tuple[Any, ...], plan: Plan) -> "Refs":
        """Names for the references that Pallas passes by position."""
        left = list(refs)

        def take(there: bool = True) -> Any:
            return left.pop(0) if there else None

        x, codes, scale, zero = take(), take(), take(), take(plan.zeros)
        given = take(plan.sums and not plan.int8_tokens)
        moves = take(plan.moving)
        out, total, wide = take(), take(), take()
        x_codes, x_scale = take(plan.int8_tokens), take(plan.int8_tokens)
        made = take(plan.sums and plan.int8_tokens)
        x_sums = given if made is None else made
        lanes = take(plan.bits == crossing.BITS)
        order = lanes, moves, take(plan.moving), take(plan.summing)
        away = take(plan.summing and plan.zeros)
        tokens = x_codes, x_scale
        many = *tokens, *order, away
        return cls(x, codes, scale, zero, x_sums, out, total, wide, *many)


def kernel(*references: Any, plan: Plan) -> None:
    """The body; the grid is (tokens, outputs, inputs)."""
    refs, step = Refs.of(references, plan), pl.program_id(2)
    if plan.int8_tokens:

        @pl.when((pl.program_id(1) == 0) & (step == 0))
        def _tokens():
            _code_tokens(refs, plan)

    @pl.when(step == 0)
    def _start():
        begin(refs, plan)

    arrange(refs, step, plan)
    for first in range(0, refs.out.shape[1], plan.blocks.tile):
        accumulate(refs, pl.ds(first, plan.blocks.tile), step, plan)

    @pl.when(step == plan.steps - 1)
    def _finish():
        y = refs.total[...]
        y = y * refs.wide[0] if plan.late else y
        y = y * refs.x_scale[...] if plan.int8_tokens else y
        refs.out[...] = y.astype(refs.out.dtype)


def arrange(refs: Refs, step: Any, plan: Plan) -> None:
    """Codes and tokens of a step as decoding wants them."""
    if refs.lanes is not None:
        crossing.apart(refs.codes, refs.lanes)
    if refs.moves is None:
        return
    m, width = refs.moved.shape[0], refs.moves.shape[0]
    starts = range(0, plan.blocks.k, width)
    parts = [_inputs(refs, step, at, at + width, plan) for at in starts]
    if m % TOKENS == 0:  # whole registers: the permutation is taken in once
        both = _dot(jnp.concatenate(parts), refs.moves[...])
        parts = [both[at : at + m] for at in range(0, both.shape[0], m)]
    else:
        parts = [_dot(part, refs.moves[...]) for part in parts]
    for at, part in zip(starts, parts):
        refs.moved[:, at : at + width] = part[:, :width].astype(refs.moved.dtype)
        if plan.summing:
            refs.moved_sums[at // width] = part[:, width:]


def _code_tokens(refs: Refs, plan: Plan) -> None:
    """int8 codes of a block of tokens, kept for every block of outputs."""
    codes, refs.x_scale[...] = quantize_tokens(refs.x[...])
    sums = 0
    for step in range(plan.steps):
        part = codes[:, step * plan.blocks.k : (step + 1) * plan.blocks.k]
        refs.x_codes[step] = part.astype(refs.x_codes.dtype)
        if plan.sums:
            sums += _dot(part.astype(jnp.bfloat16), _members(step, plan))
    if plan.sums:
        refs.x_sums[...] = sums


def _members(step: int, plan: Plan) -> jax.Array:
    """1 where an input belongs to a group: `[k, G]`; sums over groups are products."""
    shape = plan.blocks.k, plan.groups
    inputs = lax.broadcasted_iota(jnp.int32, shape, 0) + step * plan.blocks.k
    length = plan.blocks.k * plan.steps if plan.late else plan.group
    # lax.div: `//` lowers to sign, for which Pallas asks the attached device.
    group = lax.div(inputs, jnp.int32(length))
    same = group == lax.broadcasted_iota(jnp.int32, shape, 1)
    return same.astype(jnp.float32).astype(jnp.bfloat16)


def begin(refs: Refs, plan: Plan) -> None:
    """What a block of outputs begins with."""
    by_step(refs.wide, refs.scale[...].astype(jnp.float32))
    refs.total[...] = offset(refs, plan)
    if refs.away is not None:
        by_step(refs.away, refs.zero[...].astype(jnp.float32) + plan.bias)


def by_step(ref: Any, rows: Any) -> None:
    """Rows of all groups as `ref[steps, groups of a step, n]`.

    Which step it is decides an address then, and not a place within registers.
    """
    steps, count = ref.shape[:2]
    for step in range(steps):
        part = rows[step * count : (step + 1) * count]
        ref[step, : part.shape[0]] = part


def offset(refs: Refs, plan: Plan) -> Any:
    """What zero points and the bias of decoding take away, before anything is added."""
    if not plan.sums:
        return jnp.zeros_like(refs.total)
    zero = refs.zero[...].astype(jnp.float32) if plan.zeros else 0.0
    weights = jnp.broadcast_to(zero + plan.bias, refs.scale.shape)
    if plan.late:
        return -refs.x_sums[...] * weights
    weights = weights * refs.scale[...].astype(jnp.float32)
    return -lax.dot(refs.x_sums[...], weights, precision=lax.Precision.HIGHEST)


def accumulate(refs: Refs, columns: Any, step: Any, plan: Plan) -> None:
    """Add one step's inputs to a tile of outputs."""
    total = refs.total[:, columns]
    for first in range(0, plan.blocks.k, plan.chunk):
        size = min(plan.chunk, plan.blocks.k - first)
        codes = refs.codes if refs.lanes is None else refs.lanes
        q = getattr(decode, plan.blocks.decode)(codes, first, size, columns, plan.bits)
        x = _columns(refs, step, first, first + size, plan)
        if plan.late:
            total += _dot(x, q.astype(plan.contract))
        elif plan.mixed:
            sums = _dot(_apart(x, plan), q).reshape(-1, *total.shape)
            for at in range(len(sums)):
                row = first + at * plan.group
                total += sums[at] * _scale(refs, row, columns, step, plan)
        elif plan.blocks.scale_on == "weights":
            total += _dot(x, _scaled(refs, q, first, columns, step, plan))
        else:
            for start, stop in _cut(size, plan.group):
                y = _dot(x[:, start:stop], q[start:stop].astype(plan.contract))
                if plan.summing:
                    y = _unbiased(refs, y, first + start, columns, step, plan)
                total += y * _scale(refs, first + start, columns, step, plan)
    refs.total[:, columns] = total


def _apart(x: Any, plan: Plan) -> Any:
    """The tokens once for each group of a chunk, inputs of other groups set to zero.

    The matrix unit takes in the weights of several groups once, and sums them apart.
    """
    shape, size = x.shape, plan.chunk
    row = lax.rem(lax.broadcasted_iota(jnp.int32, shape, 1), size // crossing.HALF)
    group = lax.div(lax.div(row, 2) * crossing.CODES, plan.group)
    wide = x.astype(jnp.float32)
    parts = [jnp.where(group == g, wide, 0) for g in range(size // plan.group)]
    return jnp.concatenate(parts).astype(x.dtype)


def _cut(size: int, group: int) -> list[tuple[int, int]]:
    """Groups within a chunk."""
    return [(at, min(at + group, size)) for at in range(0, size, group)]


def _scaled(refs: Refs, q: Any, first: int, columns: Any, step: Any, plan: Plan) -> Any:
    """Codes of a chunk times their scales."""
    pieces = [
        q[start:stop].astype(plan.scaled_in)
        * _scale(refs, first + start, columns, step, plan).astype(plan.scaled_in)
        for start, stop in _cut(q.shape[0], plan.group)
    ]
    return jnp.concatenate([piece.astype(plan.contract) for piece in pieces])


def _scale(refs: Refs, first: int, columns: Any, step: Any, plan: Plan) -> Any:
    """The row of scales of the group that starts at input `first` of this step."""
    return refs.wide[step, _group_row(first, plan), columns]


def _group_row(first: int, plan: Plan) -> slice:
    """Which of a step's rows of scales and zeros that is."""
    row = first // plan.group
    return slice(row, row + 1)


def _columns(refs: Refs, step: Any, first: int, stop: int, plan: Plan) -> Any:
    """Inputs `first` to `stop` of this step, in the dtype that is contracted."""
    if plan.int8_tokens:
        x = refs.x_codes[step, :, first:stop]
    elif plan.moving:
        x = refs.moved[:, first:stop]
    else:
        x = _inputs(refs, step, first, stop, plan)
    return x.astype(plan.contract)


def _inputs(refs: Refs, step: Any, first: int, stop: int, plan: Plan) -> Any:
    """The same of tokens as they are given.

    What starts at an address known at run time is read in whole registers.
    """
    if not plan.whole_tokens or plan.steps == 1:
        return refs.x[:, first:stop]
    low, high = first // LANES * LANES, -(-stop // LANES) * LANES
    start = pl.multiple_of(step * plan.blocks.k, plan.blocks.k)
    x = refs.x[:, pl.ds(start + low, high - low)]
    return x[:, first - low : stop - low]


def _unbiased(refs: Refs, y: Any, first: int, columns: Any, step: Any, plan: Plan):
    """Products of the group from input `first` on, without bias and zero points."""
    count = plan.group // LANES
    at = first // LANES
    sums = sum(refs.moved_sums[i] for i in range(at, at + count))
    wide = jnp.concatenate([sums] * -(-y.shape[1] // LANES), 1)[:, : y.shape[1]]
    if refs.away is None:
        return y - wide * plan.bias
    return y - wide * refs.away[step, _group_row(first, plan), columns]


def _dot(x: Any, w: Any) -> Any:
    """Product in float32; of whole numbers, exact in int32 first."""
    whole = jnp.issubdtype(x.dtype, jnp.integer)
    kind = jnp.int32 if whole else jnp.float32
    y = lax.dot_general(x, w, (((1,), (0,)), ((), ())), preferred_element_type=kind)
    return y.astype(jnp.float32)
