"""Grouped products with integer codes on a TPU's matrix unit.

The grid is (outputs, visits, inputs). A visit is a block of rows and one expert
(`visits.py`); how many there are is known only at run time, and so is the grid. What a
visit does is what `int_matmul` does in one step; its rows alone are written. Where all
inputs fit, one step takes them, and an expert's weights are read once for all its rows.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qjax_kernels.compat import chip
from qjax_kernels.int_matmul import blocks as int_blocks
from qjax_kernels.int_matmul.blocks import Blocks, vmem_limit
from qjax_kernels.int_matmul.body import Plan, Refs, accumulate, arrange, begin
from qjax_kernels.int_matmul.pallas_tpu import group_sums, moved_scratch, wide_scratch
from qjax_kernels.int_matmul.pallas_tpu import name_of as int_name_of
from qjax_kernels.int_matmul.reference import quantize_tokens
from qjax_kernels.int_matmul.weight import IntWeight
from qjax_kernels.ragged_matmul.reference import check, one_expert
from qjax_kernels.ragged_matmul.visits import visits

FEWEST_ROWS, MOST_ROWS = 32, 256


def ragged_matmul(
    x: Any,
    experts: IntWeight,
    sizes: Any,
    *,
    generation: str,
    int8_tokens: bool = False,
    dtype: Any = None,
    blocks: Blocks | None = None,
    interpret: Any = False,
) -> jax.Array:
    """Rows of `x[M, K]` times their experts; see `reference.ragged_matmul`.

    Args:
      x: float.
      experts: coded weights, experts on the leading axis of every child.
      sizes: int32 `[E]`, rows of each expert.
      generation: of the TPU: "v5e", "v5p", "v6e" or "v7x".
      int8_tokens: quantize tokens to int8, one scale each, before the kernel.
      dtype: of the result; default that of `x`.
      blocks: sizes of one grid step; default `choose`'s.
      interpret: as for `pl.pallas_call`.

    Returns:
      `[M, N]`.

    Raises:
      ValueError: shapes or dtypes do not agree, or the blocks need more VMEM than the
        generation has.
    """
    check(x, experts, sizes)
    one, M = one_expert(experts), x.shape[0]
    dtype = jnp.dtype(x.dtype if dtype is None else dtype)
    if blocks is None:
        blocks = choose(generation, M, experts, int8_tokens)
    blocks = blocks.fitted(M, one, int8_tokens)
    native = chip(generation).is_matmul_supported(jnp.int8, jnp.int8)
    contract = jnp.int8 if int8_tokens and native else jnp.bfloat16
    if contract == jnp.int8 and blocks.scale_on == "weights":
        raise ValueError('Blocks.scale_on is "weights"; int8 products need "sums"')
    # Tokens are coded before the kernel: their codes are its activations.
    plan = Plan.of(one, blocks, False, contract)
    todo = visits(sizes, M, blocks.m)
    operands, specs = _operands(x, experts, one, int8_tokens, plan)
    return pl.pallas_call(
        partial(_kernel, plan=plan, scaled=int8_tokens),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(pl.cdiv(one.N, blocks.n), todo.count, plan.steps),
            in_specs=specs,
            out_specs=pl.BlockSpec((blocks.m, blocks.n), _by_rows_and_outputs),
            scratch_shapes=[
                pltpu.VMEM((blocks.m, blocks.n), jnp.float32),
                wide_scratch(plan),
                *moved_scratch(plan),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((M, one.N), dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=vmem_limit(generation, blocks, one),
        ),
        interpret=interpret,
        name=name_of(experts, int8_tokens),
    )(todo.block, todo.expert, todo.first, todo.stop, *operands)


def choose(
    generation: str, M: int, experts: IntWeight, int8_tokens: bool = False
) -> Blocks:
    """`int_matmul`'s blocks for an expert's rows, with all inputs if they fit.

    int8 tokens have scales on sums.
    """
    one, E = one_expert(experts), experts.codes.shape[0]
    rows = min(max(FEWEST_ROWS, pl.next_power_of_2(-(-M // E))), MOST_ROWS)
    found = int_blocks.choose(generation, rows, one, int8_tokens)
    scale_on = "sums" if int8_tokens else found.scale_on
    found = replace(found, m=min(rows, M), scale_on=scale_on)
    whole = replace(found, k=one.rows)
    return found if int_blocks.too_large(generation, whole, one) else whole


def name_of(experts: IntWeight, int8_tokens: bool = False) -> str:
    """A name for profiles: `ragged_w4a16_g128`."""
    return f"ragged_{int_name_of(one_expert(experts), int8_tokens)}"


@dataclass(frozen=True)
class _Scalars:
    """What a step reads of the visits."""

    block: Any
    expert: Any
    first: Any
    stop: Any

    def rows(self, m: int) -> Any:
        """Whether a row of the block is of this visit's expert, `[m, 1]`."""
        at = pl.program_id(1)
        row = lax.broadcasted_iota(jnp.int32, (m, 1), 0) + self.block[at] * m
        return (row >= self.first[at]) & (row < self.stop[at])

    def opens(self) -> Any:
        """Whether this is the first visit of its block of rows."""
        at = pl.program_id(1)
        before = self.block[jnp.maximum(at - 1, 0)]
        return (at == 0) | (self.block[at] != before)


def _kernel(*references: Any, plan: Plan, scaled: bool) -> None:
    """One step: some inputs of one visit, for a block of outputs."""
    todo, left = _Scalars(*references[:4]), list(references[4:])
    x_scale = left.pop(0) if scaled else None
    refs, step = Refs.of(tuple(left), plan), pl.program_id(2)

    @pl.when((step == 0) & todo.opens())
    def _open():
        refs.out[...] = jnp.zeros_like(refs.out)

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
        y = y if x_scale is None else y * x_scale[...]
        kept = refs.out[...]
        refs.out[...] = jnp.where(todo.rows(plan.blocks.m), y.astype(kept.dtype), kept)


def _by_rows_and_outputs(j: Any, v: Any, k: Any, block: Any, *_: Any) -> Any:
    return block[v], j


def _operands(
    x: Any, experts: IntWeight, one: IntWeight, int8_tokens: bool, plan: Plan
) -> tuple[list[Any], list[Any]]:
    """Arrays and how they are cut; of codes and scales, one expert at a time."""
    m, n, k = plan.blocks.m, plan.blocks.n, plan.blocks.k
    operands, specs = [], []
    if int8_tokens:
        x, x_scale = quantize_tokens(x)
        operands.append(x_scale)
        specs.append(pl.BlockSpec((m, 1), lambda j, v, k, block, *_: (block[v], 0)))
    else:
        x = x.astype(jnp.bfloat16)
    x = jnp.pad(x, ((0, 0), (0, one.rows - one.K))) if one.rows > one.K else x
    stored = k * experts.codes.shape[1] // one.rows
    half = experts.scale.dtype == jnp.float16
    scale = experts.scale.astype(jnp.float32) if half else experts.scale
    per_group = pl.BlockSpec(
        (None, one.groups, n), lambda j, v, k, block, expert, *_: (expert[v], 0, j)
    )
    operands += [x, experts.codes, scale]
    specs += [
        pl.BlockSpec((m, k), lambda j, v, k, block, *_: (block[v], k)),
        pl.BlockSpec(
            (None, stored, n), lambda j, v, k, block, expert, *_: (expert[v], k, j)
        ),
        per_group,
    ]
    if experts.zero is not None:
        whole = experts.zero.dtype == jnp.int8
        operands.append(experts.zero if whole else experts.zero.astype(jnp.float32))
        specs.append(per_group)
    if plan.sums:
        operands.append(group_sums(x, one))
        specs.append(
            pl.BlockSpec((m, one.groups), lambda j, v, k, block, *_: (block[v], 0))
        )
    if plan.moving:
        operands.append(jnp.asarray(plan.moves, jnp.bfloat16))
        specs.append(pl.BlockSpec(plan.moves.shape, lambda *_: (0, 0)))
    return operands, specs
