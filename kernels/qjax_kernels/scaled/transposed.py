"""`dy @ w^T` on a TPU, for the gradient by activations; weights are never written out.

The grid is (tokens, inputs, outputs), outputs innermost. Scales differ along the
contracted axis, so they go on the weights, which are rounded to bfloat16 as XLA's form
rounds them.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qjax_kernels.scaled.kernel import float_scale
from qjax_kernels.scaled.operands import (
    LANES,
    Blocks,
    Decoder,
    Operands,
    divisor,
    require,
    vmem_bytes,
    vmem_limit,
)
from qjax_kernels.scaled.table import sizes

BLOCKS = Blocks(**sizes("scaled"))
"""Sizes of one grid step, for every generation."""


@dataclass(frozen=True)
class Plan:
    """Everything static that the body needs."""

    decoder: Decoder
    blocks: Blocks
    group: int
    groups: int
    steps: int
    has_zero: bool
    has_table: bool


def transposed_matmul(
    dy: Any,
    given: Operands,
    decoder: Decoder,
    blocks: Blocks = BLOCKS,
    *,
    generation: str,
    name: str,
    dtype: Any,
    zero: Any = None,
    interpret: Any = False,
) -> jax.Array:
    """`dy[M, N] @ w[K, N]^T`, contracted in bfloat16, accumulated in float32.

    Args:
      dy: float.
      given: the coded weight.
      decoder: of its codes, to bfloat16.
      blocks: sizes of one grid step; they are fitted to the problem.
      generation: of the TPU.
      name: for profiles.
      dtype: of the result.
      zero: float32 `[G, N]`, subtracted from decoded numbers, or None.
      interpret: as for `pl.pallas_call`.

    Returns:
      `[M, K]`.

    Raises:
      ValueError: the blocks need more VMEM than the generation has.
    """
    blocks = fitted(blocks, dy.shape[0], given, decoder)
    require(generation, blocks, given, decoder, 2)
    rows, scale = given.rows(decoder), given.scale
    plan = Plan(
        decoder,
        blocks,
        min(given.group or rows, rows),
        scale.shape[0],
        given.N // blocks.n,
        zero is not None,
        given.table is not None,
    )
    operands, specs = _operands(dy, given, zero, plan)
    dx = pl.pallas_call(
        partial(body, plan=plan),
        grid=(pl.cdiv(dy.shape[0], blocks.m), rows // blocks.k, plan.steps),
        in_specs=specs,
        out_specs=pl.BlockSpec((blocks.m, blocks.k), lambda i, j, k: (i, j)),
        out_shape=jax.ShapeDtypeStruct((dy.shape[0], rows), dtype),
        scratch_shapes=[pltpu.VMEM((blocks.m, blocks.k), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=vmem_limit(needed(blocks, given, decoder)),
        ),
        interpret=interpret,
        name=name,
    )(*operands)
    return restored(dx, positions(plan))[:, : given.K]


def fitted(blocks: Blocks, M: int, given: Operands, decoder: Decoder) -> Blocks:
    """Blocks that fit, with a width that divides the outputs: they are summed over."""
    narrow = Blocks(
        blocks.m,
        divisor(given.N, blocks.n, LANES),
        blocks.k,
        chunk=blocks.chunk,
    )
    return narrow.fitted(M, given, decoder)


def needed(blocks: Blocks, given: Operands, decoder: Decoder) -> int:
    """VMEM of one grid step, in which decoded weights are transposed."""
    decoded = blocks.chunk * blocks.n * 8 + 2 * blocks.m * blocks.k * 4
    return vmem_bytes(blocks, given, decoder, 2) + decoded


def _operands(
    dy: Any, given: Operands, zero: Any, plan: Plan
) -> tuple[list[Any], list[Any]]:
    """Arrays and how they are cut; scales and zeros are whole along K."""
    m, n, k, G = plan.blocks.m, plan.blocks.n, plan.blocks.k, plan.groups
    scale = given.scale
    scale = scale if scale.dtype == jnp.uint8 else scale.astype(jnp.float32)
    scale = float_scale(scale)
    per_group = pl.BlockSpec((G, n), lambda i, j, k: (0, k))
    operands = [dy.astype(jnp.bfloat16), given.codes, scale]
    specs = [
        pl.BlockSpec((m, n), lambda i, j, k: (i, k)),
        pl.BlockSpec((k // plan.decoder.per_row, n), lambda i, j, k: (j, k)),
        per_group,
    ]
    if zero is not None:
        operands.append(zero.astype(jnp.float32))
        specs.append(per_group)
    if given.table is not None:
        operands.append(jnp.broadcast_to(given.table, (given.table.shape[0], n)))
        specs.append(pl.BlockSpec((given.table.shape[0], n), lambda i, j, k: (0, 0)))
    return operands, specs


def body(*references: Any, plan: Plan) -> None:
    """One grid step."""
    left = list(references)
    dy, codes, scale = left.pop(0), left.pop(0), left.pop(0)
    zero = left.pop(0) if plan.has_zero else None
    table = left.pop(0) if plan.has_table else None
    out, total = left
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _start():
        total[...] = jnp.zeros_like(total)

    tokens, size = dy[...], plan.blocks.chunk
    for first in range(0, plan.blocks.k, size):
        parts = plan.decoder.parts(codes, table, first, size, slice(None))
        w = weights(parts, scale, zero, first, plan)
        inputs = slice(first, first + size)
        total[:, inputs] += lax.dot_general(
            tokens, w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
        )

    @pl.when(step == plan.steps - 1)
    def _finish():
        out[...] = (total[...] * plan.decoder.factor).astype(out.dtype)


def weights(parts: list[Any], scale: Any, zero: Any, first: int, plan: Plan) -> Any:
    """`(decoded - zero) * scale` of one chunk in bfloat16, in the order of parts."""
    length = parts[0].shape[0]
    rows = length if plan.groups == 1 else plan.group // len(parts)
    above = pl.program_id(1) * (plan.blocks.k // plan.group) if plan.groups > 1 else 0
    pieces = []
    for part in parts:
        for at in range(0, length, rows):
            row = above + first // plan.group + at // rows if plan.groups > 1 else 0
            w = part[at : at + rows].astype(jnp.float32)
            w = w if zero is None else w - zero[pl.ds(row, 1), :]
            pieces.append((w * scale[pl.ds(row, 1), :]).astype(jnp.bfloat16))
    return jnp.concatenate(pieces)


def positions(plan: Plan) -> np.ndarray:
    """Which input of a chunk each computed column is."""
    return plan.decoder.order(plan.blocks.chunk).reshape(-1)


def restored(dx: Any, order: np.ndarray) -> Any:
    """Columns of every chunk of `dx` in the order of inputs."""
    size = len(order)
    if (order == np.arange(size)).all():
        return dx
    # A product with a permutation is exact where its type is kept.
    moves = jnp.asarray(order[:, None] == np.arange(size), dx.dtype)
    parts = dx.reshape(dx.shape[0], -1, size)
    moved = jnp.einsum("mgc,cd->mgd", parts, moves, precision="highest")
    return moved.reshape(dx.shape)
