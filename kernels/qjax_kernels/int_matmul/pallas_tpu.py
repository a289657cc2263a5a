"""`x @ w` with integer codes on a TPU's matrix unit.

The grid is (tokens, outputs, inputs), inputs innermost; `body.py` is one step. Codes
are read as qjax stores them: there is nothing to repack. With `int8_tokens` a block of
tokens is quantized once, in VMEM, and meets every block of outputs.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qjax_kernels import crossing
from qjax_kernels.compat import chip
from qjax_kernels.int_matmul.blocks import (
    LANES,
    Blocks,
    choose,
    contracted,
    tokens_stay,
    vmem_limit,
)
from qjax_kernels.int_matmul.body import Plan, kernel
from qjax_kernels.int_matmul.weight import IntWeight


def int_matmul(
    x: Any,
    weight: IntWeight,
    *,
    generation: str,
    int8_tokens: bool = False,
    dtype: Any = None,
    blocks: Blocks | None = None,
    interpret: Any = False,
) -> jax.Array:
    """`x[M, K] @ w[K, N]`; see `reference.int_matmul`.

    Float activations are contracted in bfloat16. With `decode="offset"` blocks, 143
    times the sum of a group's `|x|` must be finite in float32.

    Args:
      x: float.
      weight: the coded weight.
      generation: of the TPU: "v5e", "v5p", "v6e" or "v7x".
      int8_tokens: quantize tokens to int8, one scale each, in the kernel.
      dtype: of the result; default that of `x`.
      blocks: sizes of one grid step; default the table's.
      interpret: as for `pl.pallas_call`.

    Returns:
      `[M, N]`.

    Raises:
      ValueError: shapes or dtypes do not agree, the blocks need more VMEM than the
        generation has, or 3-bit codes do not come in whole registers.
    """
    weight.check(x)
    cannot = crossing.unfit(weight)
    if weight.bits == crossing.BITS and int8_tokens:
        cannot = "the kernel has int8 tokens for 2, 4 and 8 bits only"
    if cannot:
        raise ValueError(f"IntWeight.bits is 3, but {cannot}")
    dtype = jnp.dtype(x.dtype if dtype is None else dtype)
    M = x.shape[0]
    if blocks is None:
        blocks = choose(generation, M, weight, int8_tokens)
    blocks = blocks.fitted(M, weight, int8_tokens)
    limit = vmem_limit(generation, blocks, weight, int8_tokens)
    contract = jnp.dtype(contracted(generation, blocks, weight, int8_tokens))
    # v5 has no bfloat16 arithmetic.
    scaled_in = jnp.bfloat16 if chip(generation).generation > 5 else jnp.float32
    whole = int8_tokens or tokens_stay(blocks, weight)
    plan = Plan.of(weight, blocks, int8_tokens, contract, scaled_in, whole)
    operands, specs = _operands(x, weight, plan)
    tokens = "arbitrary" if int8_tokens else "parallel"
    return pl.pallas_call(
        partial(kernel, plan=plan),
        grid=(pl.cdiv(M, blocks.m), pl.cdiv(weight.N, blocks.n), plan.steps),
        in_specs=specs,
        out_specs=pl.BlockSpec((blocks.m, blocks.n), lambda i, j, k: (i, j)),
        out_shape=jax.ShapeDtypeStruct((M, weight.N), dtype),
        scratch_shapes=_scratch(weight, plan),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", tokens, "arbitrary"),
            vmem_limit_bytes=limit,
        ),
        interpret=interpret,
        name=name_of(weight, int8_tokens),
    )(*operands)


def name_of(weight: IntWeight, int8_tokens: bool = False) -> str:
    """A name for profiles: `w4a16_g128_zero`."""
    group = "channel" if weight.groups == 1 else f"g{weight.group}"
    zero = "" if weight.zero is None else "_zero"
    return f"w{weight.bits}a{8 if int8_tokens else 16}_{group}{zero}"


def _operands(x: Any, weight: IntWeight, plan: Plan) -> tuple[list[Any], list[Any]]:
    """Arrays and how they are cut; scales and zeros are whole along K."""
    m, n, k, G = plan.blocks.m, plan.blocks.n, plan.blocks.k, weight.groups
    x = _pad_columns(x, weight.rows)
    given = x if plan.int8_tokens else x.astype(jnp.bfloat16)
    stored = k * weight.codes.shape[0] // weight.rows
    by_input = pl.BlockSpec((m, k), lambda i, j, k: (i, k))
    all_inputs = pl.BlockSpec((m, weight.rows), lambda i, j, k: (i, 0))
    per_group = pl.BlockSpec((G, n), lambda i, j, k: (0, j))
    operands = [given, weight.codes, weight.scale.astype(_scale_dtype(weight))]
    specs = [all_inputs if plan.whole_tokens else by_input]
    specs += [pl.BlockSpec((stored, n), lambda i, j, k: (k, j)), per_group]
    if weight.zero is not None:
        zero = weight.zero
        operands.append(zero if zero.dtype == jnp.int8 else zero.astype(jnp.float32))
        specs.append(per_group)
    if plan.sums and not plan.int8_tokens:
        operands.append(group_sums(x.astype(jnp.bfloat16), weight))
        specs.append(pl.BlockSpec((m, G), lambda i, j, k: (i, 0)))
    if plan.moving:
        operands.append(jnp.asarray(plan.moves, jnp.bfloat16))
        specs.append(pl.BlockSpec(plan.moves.shape, lambda i, j, k: (0, 0)))
    return operands, specs


def _scale_dtype(weight: IntWeight) -> Any:
    """float16 is no type of a TPU's vector unit."""
    half = weight.scale.dtype == jnp.float16
    return jnp.dtype(jnp.float32) if half else weight.scale.dtype


def _scratch(weight: IntWeight, plan: Plan) -> list[Any]:
    m, n = plan.blocks.m, plan.blocks.n
    scratch = [
        pltpu.VMEM((m, n), jnp.float32),
        wide_scratch(plan),
    ]
    if plan.int8_tokens:
        scratch.append(pltpu.VMEM((plan.steps, m, plan.blocks.k), plan.contract))
        scratch.append(pltpu.VMEM((m, 1), jnp.float32))
        if plan.sums:
            scratch.append(pltpu.VMEM((m, weight.groups), jnp.float32))
    if weight.bits == crossing.BITS:
        rows = plan.blocks.k * crossing.WORDS // crossing.CODES
        scratch.append(pltpu.VMEM(crossing.lanes_shape(rows, n), jnp.uint32))
    return scratch + moved_scratch(plan)


def wide_scratch(plan: Plan) -> Any:
    """Scales of a block of outputs in float32, by step."""
    groups = (1, 1) if plan.late else (plan.steps, plan.step_groups)
    return pltpu.VMEM((*groups, plan.blocks.n), jnp.float32)


def moved_scratch(plan: Plan) -> list[Any]:
    """Tokens of a step in another order, their sums, and zero points to take away."""
    scratch, m, k = [], plan.blocks.m, plan.blocks.k
    if plan.moving:
        scratch.append(pltpu.VMEM((m, k), jnp.bfloat16))
    if plan.summing:
        scratch.append(pltpu.VMEM((k // LANES, m, LANES), jnp.float32))
    if plan.summing and plan.zeros:
        scratch.append(wide_scratch(plan))
    return scratch


def group_sums(x: Any, weight: IntWeight) -> jax.Array:
    """Sums of `x[M, K]` over the inputs of each group, float32 `[M, G]`."""
    group = min(weight.group or weight.rows, weight.rows)
    x = _pad_columns(x, weight.groups * group).astype(jnp.float32)
    x = x[:, : weight.groups * group]
    return x.reshape(x.shape[0], weight.groups, group).sum(-1)


def _pad_columns(x: Any, columns: int) -> Any:
    missing = columns - x.shape[1]
    return jnp.pad(x, ((0, 0), (0, missing))) if missing > 0 else x
