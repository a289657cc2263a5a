"""`x @ (decoded * scale)` on a TPU; the grid is (tokens, outputs, inputs)."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qjax_kernels import crossing
from qjax_kernels.scaled.operands import (
    Blocks,
    Decoder,
    Operands,
    require,
    vmem_bytes,
    vmem_limit,
)


@dataclass(frozen=True)
class Plan:
    """Everything static that the body needs."""

    decoder: Decoder
    blocks: Blocks
    group: int
    steps: int
    late: bool
    has_table: bool
    has_rows: bool
    scaled_in: Any  # dtype of weights times scales


def scaled_matmul(
    x: Any,
    given: Operands,
    decoder: Decoder,
    blocks: Blocks,
    *,
    generation: str,
    name: str,
    dtype: Any,
    row_scale: Any = None,
    interpret: Any = False,
) -> jax.Array:
    """`row_scale * (x[M, K] @ w[K, N])`, accumulated in float32.

    Args:
      x: in the dtype that the decoder's numbers have.
      given: the coded weight.
      decoder: of its codes.
      blocks: sizes of one grid step; they are fitted to the problem.
      generation: of the TPU.
      name: for profiles.
      dtype: of the result.
      row_scale: float32 `[M, 1]`, or None.
      interpret: as for `pl.pallas_call`.

    Returns:
      `[M, N]`.

    Raises:
      ValueError: the blocks need more VMEM than the generation has.
    """
    M = x.shape[0]
    blocks = blocks.fitted(M, given, decoder)
    require(generation, blocks, given, decoder, x.dtype.itemsize)
    plan = _plan(given, decoder, blocks, generation, row_scale is not None)
    operands, specs = _operands(x, given, row_scale, plan)
    needed = vmem_bytes(blocks, given, decoder, x.dtype.itemsize)
    return pl.pallas_call(
        partial(body, plan=plan),
        grid=(pl.cdiv(M, blocks.m), pl.cdiv(given.N, blocks.n), plan.steps),
        in_specs=specs,
        out_specs=pl.BlockSpec((blocks.m, blocks.n), lambda i, j, k: (i, j)),
        out_shape=jax.ShapeDtypeStruct((M, given.N), dtype),
        scratch_shapes=[
            pltpu.VMEM((blocks.m, blocks.n), jnp.float32),
            pltpu.VMEM((given.scale.shape[0], blocks.n), jnp.float32),
            *lanes(blocks, decoder),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=vmem_limit(needed),
        ),
        interpret=interpret,
        name=name,
    )(*operands)


def lanes(blocks: Blocks, decoder: Decoder) -> list[Any]:
    """Memory for words that codes cross."""
    rows = blocks.k // decoder.per_row
    shape = crossing.lanes_shape(rows, blocks.n)
    return [pltpu.VMEM(shape, jnp.uint32)] if decoder.crosses else []


def _plan(
    given: Operands, decoder: Decoder, blocks: Blocks, generation: str, has_rows: bool
) -> Plan:
    rows = given.rows(decoder)
    # v5 has no bfloat16 arithmetic.
    old = generation in ("v5e", "v5p")
    return Plan(
        decoder=decoder,
        blocks=blocks,
        group=min(given.group or rows, rows),
        steps=rows // blocks.k,
        late=given.late,
        has_table=given.table is not None,
        has_rows=has_rows,
        scaled_in=jnp.float32 if old else jnp.bfloat16,
    )


def _operands(
    x: Any, given: Operands, row_scale: Any, plan: Plan
) -> tuple[list[Any], list[Any]]:
    """Arrays and how they are cut; scales are whole along K."""
    m, n, k = plan.blocks.m, plan.blocks.n, plan.blocks.k
    rows = given.rows(plan.decoder)
    x = jnp.pad(x, ((0, 0), (0, rows - x.shape[1]))) if rows > x.shape[1] else x
    stored = k // plan.decoder.per_row
    operands = [reordered(x, positions(plan)), given.codes, _plain(given.scale)]
    specs = [
        pl.BlockSpec((m, k), lambda i, j, k: (i, k)),
        pl.BlockSpec((stored, n), lambda i, j, k: (k, j)),
        pl.BlockSpec((given.scale.shape[0], n), lambda i, j, k: (0, j)),
    ]
    if given.table is not None:
        operands.append(jnp.broadcast_to(given.table, (given.table.shape[0], n)))
        specs.append(pl.BlockSpec((given.table.shape[0], n), lambda i, j, k: (0, 0)))
    if row_scale is not None:
        operands.append(row_scale)
        specs.append(pl.BlockSpec((m, 1), lambda i, j, k: (i, 0)))
    return operands, specs


def _plain(scale: Any) -> Any:
    """float16 is no type of a TPU's vector unit."""
    return scale.astype(jnp.float32) if scale.dtype == jnp.float16 else scale


def positions(plan: Plan) -> np.ndarray:
    """Which input of a chunk meets each decoded row."""
    order = plan.decoder.order(plan.blocks.chunk)
    if plan.late:
        return order.reshape(-1)
    rows = max(plan.group // len(order), 1)
    cuts = range(0, order.shape[1], rows)
    return np.concatenate([order[:, at : at + rows].reshape(-1) for at in cuts])


def reordered(x: Any, order: np.ndarray) -> Any:
    """Columns of every chunk of `x` as the decoder orders inputs."""
    size = len(order)
    if (order == np.arange(size)).all():
        return x
    # A product with a permutation is exact, and far cheaper than moving single lanes.
    moves = jnp.asarray(np.arange(size)[:, None] == order, x.dtype)
    parts = x.reshape(x.shape[0], -1, size)
    return jnp.einsum("mgc,cd->mgd", parts, moves).reshape(x.shape)


def body(*references: Any, plan: Plan) -> None:
    """One grid step."""
    left = list(references)
    x, codes, scale = left.pop(0), left.pop(0), left.pop(0)
    table = left.pop(0) if plan.has_table else None
    row_scale = left.pop(0) if plan.has_rows else None
    out, total, wide, *apart = left
    step = pl.program_id(2)
    if apart:
        crossing.apart(codes, apart[0])
        codes = apart[0]

    @pl.when(step == 0)
    def _start():
        wide[...] = float_scale(scale[...])
        total[...] = jnp.zeros_like(total)

    for first in range(0, plan.blocks.n, plan.blocks.tile):
        accumulate(x, codes, table, total, wide, pl.ds(first, plan.blocks.tile), plan)

    @pl.when(step == plan.steps - 1)
    def _finish():
        y = total[...]
        y = y * wide[...] if plan.late else y
        y = y * plan.decoder.factor if plan.decoder.factor != 1 else y
        y = y if row_scale is None else y * row_scale[...]
        out[...] = y.astype(out.dtype)


def float_scale(scale: Any) -> Any:
    """Scales in float32; exponents of two are put where float32 has its own."""
    if scale.dtype != jnp.uint8:
        return scale.astype(jnp.float32)
    exponent = scale.astype(jnp.int32)
    power = lax.bitcast_convert_type(exponent << 23, jnp.float32)
    return jnp.where(exponent == 255, jnp.float32(np.nan), power)


def accumulate(
    x: Any, codes: Any, table: Any, total: Any, wide: Any, columns: Any, plan: Plan
) -> None:
    """Add one step's inputs to a tile of outputs."""
    size, sums = plan.blocks.chunk, total[:, columns]
    step = pl.program_id(2)
    for first in range(0, plan.blocks.k, size):
        parts = plan.decoder.parts(codes, table, first, size, columns)
        tokens = x[:, first : first + size]
        if plan.late:
            sums += dot(tokens, jnp.concatenate(parts))
            continue
        row = step * (plan.blocks.k // plan.group) + first // plan.group
        count = -(-size // plan.group)
        scales = [wide[pl.ds(row + at, 1), columns] for at in range(count)]
        if plan.blocks.scale_on == "weights":
            sums += dot(tokens, scaled(parts, scales, plan))
        else:
            sums += scaled_sums(tokens, parts, scales, plan)
    total[:, columns] = sums


def scaled(parts: list[Any], scales: list[Any], plan: Plan) -> Any:
    """Decoded numbers times their scales, in the order of `positions`."""
    rows = plan.group // len(parts)
    kind = parts[0].dtype
    pieces = []
    for at, scale in enumerate(scales):
        cut, one = slice(at * rows, (at + 1) * rows), scale.astype(plan.scaled_in)
        pieces += [
            (part[cut].astype(plan.scaled_in) * one).astype(kind) for part in parts
        ]
    return jnp.concatenate(pieces)


def scaled_sums(tokens: Any, parts: list[Any], scales: list[Any], plan: Plan) -> Any:
    """The sums of all groups of a chunk, each times its scale."""
    rows, total = plan.group // len(parts), 0
    for at, scale in enumerate(scales):
        cut = slice(at * rows, (at + 1) * rows)
        w = jnp.concatenate([part[cut] for part in parts])
        first = at * plan.group
        total += dot(tokens[:, first : first + w.shape[0]], w) * scale
    return total


def dot(x: Any, w: Any) -> Any:
    """Product in float32."""
    return lax.dot_general(
        x, w, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32
    )
