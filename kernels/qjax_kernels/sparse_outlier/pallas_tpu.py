"""Outlier features in float beside int8 (LLM.int8()), on a TPU in one pass.

The features are found at run time, so shapes cannot follow them. Weights are read once;
each chunk of inputs meets the codes of `x` in int8, and a chunk that holds an outlier
feature, which few do, meets the float values too. See `int_matmul` for the rest.
"""

from dataclasses import dataclass, replace
from functools import partial
from math import lcm
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qjax_kernels.coded import WORD
from qjax_kernels.compat import chip
from qjax_kernels.int_matmul import blocks as int_blocks
from qjax_kernels.int_matmul import decode
from qjax_kernels.int_matmul.blocks import LANES, SUBLANES, Blocks
from qjax_kernels.int_matmul.body import Plan, Refs, accumulate, by_step, offset
from qjax_kernels.int_matmul.pallas_tpu import group_sums, wide_scratch
from qjax_kernels.int_matmul.pallas_tpu import name_of as int_name_of
from qjax_kernels.int_matmul.weight import IntWeight
from qjax_kernels.sparse_outlier.reference import check

CHUNK = 256  # inputs that are left out together if none is an outlier
MOST_TOKENS = 256  # of a step, which holds them twice


def sparse_outlier(
    codes: Any,
    steps: Any,
    kept: Any,
    weight: IntWeight,
    *,
    generation: str,
    dtype: Any = None,
    blocks: Blocks | None = None,
    interpret: Any = False,
) -> jax.Array:
    """`(codes * steps + kept) @ w`.

    See `reference.sparse_outlier`; what stays in float is contracted in bfloat16.

    Args:
      codes: int8 `[M, K]`, 0 in the outlier features.
      steps: float32 `[M, 1]`, what a code of a token is worth.
      kept: float `[M, K]`, the outlier features' values, 0 elsewhere.
      weight: the coded weight.
      generation: of the TPU: "v5e", "v5p", "v6e" or "v7x".
      dtype: of the result; default that of `kept`.
      blocks: sizes of one grid step; default the table's of int8 tokens.
      interpret: as for `pl.pallas_call`.

    Returns:
      `[M, N]`.

    Raises:
      ValueError: shapes or dtypes do not agree, or the blocks need more VMEM than the
        generation has.
    """
    check(codes, steps, kept, weight)
    dtype = jnp.dtype(kept.dtype if dtype is None else dtype)
    M = codes.shape[0]
    if blocks is None:
        blocks = choose(generation, M, weight)
    blocks = blocks.fitted(M, weight, True)
    native = chip(generation).is_matmul_supported(jnp.int8, jnp.int8)
    plan = Plan.of(weight, blocks, False, jnp.int8 if native else jnp.bfloat16)
    chunk = chunk_of(weight, blocks)
    kept = kept.astype(jnp.bfloat16)
    codes, kept = (_padded(each, weight.rows) for each in (codes, kept))
    flags = jnp.any(kept.reshape(M, -1, chunk) != 0, axis=(0, 2)).astype(jnp.int32)
    operands, specs = _operands(weight, codes, kept, steps, plan)
    m, n = blocks.m, blocks.n
    return pl.pallas_call(
        partial(_kernel, plan=plan, chunk=chunk),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(pl.cdiv(M, m), pl.cdiv(weight.N, n), plan.steps),
            in_specs=specs,
            out_specs=pl.BlockSpec((m, n), lambda i, j, k, _: (i, j)),
            scratch_shapes=[
                pltpu.VMEM((m, n), jnp.float32),
                pltpu.VMEM((m, n), jnp.float32),
                wide_scratch(plan),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((M, weight.N), dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=int_blocks.vmem_limit(generation, _roomy(blocks), weight),
        ),
        interpret=interpret,
        name=name_of(weight),
    )(flags, *operands)


def name_of(weight: IntWeight) -> str:
    """A name for profiles: `outliers_w8a8_channel`."""
    return f"outliers_{int_name_of(weight, True)}"


def choose(generation: str, M: int, weight: IntWeight) -> Blocks:
    """`int_matmul`'s blocks; scales on sums, for codes meet two kinds of tokens."""
    blocks = int_blocks.choose(generation, M, weight, True)
    return replace(blocks, m=min(blocks.m, MOST_TOKENS), scale_on="sums")


def chunk_of(weight: IntWeight, blocks: Blocks) -> int:
    """Inputs with one flag: whole groups and registers, a part of a step."""
    unit = lcm(weight.group or 1, LANES, SUBLANES * WORD // weight.bits)
    sizes = range(max(CHUNK // unit, 1) * unit, 0, -unit)
    return next((c for c in sizes if blocks.k % c == 0), blocks.k)


def too_large(generation: str, M: int, weight: IntWeight) -> str:
    """That a step needs more VMEM than there is; empty if it does not."""
    blocks = choose(generation, M, weight)
    return int_blocks.too_large(generation, _roomy(blocks), weight)


def _roomy(blocks: Blocks) -> Blocks:
    """Blocks that stand for the VMEM of two kinds of tokens and two sums."""
    return replace(blocks, m=2 * blocks.m)


@dataclass(frozen=True)
class _Side:
    """One kind of tokens: int8 codes, or what stays in float."""

    x: Any
    sums: Any
    total: Any

    def refs(self, weight: tuple[Any, Any, Any], wide: Any, out: Any) -> Refs:
        """As the body of `int_matmul` takes them."""
        codes, scale, zero = weight
        return Refs(
            self.x, codes, scale, zero, self.sums, out, self.total, wide, None, None
        )


def _kernel(flags: Any, *references: Any, plan: Plan, chunk: int) -> None:
    """The body; the grid is (tokens, outputs, inputs)."""
    left = list(references)
    x_codes, kept, steps, codes, scale = (left.pop(0) for _ in range(5))
    zero = left.pop(0) if plan.zeros else None
    sums = (left.pop(0), left.pop(0)) if plan.sums else (None, None)
    out, total, kept_total, wide = left
    step, weight = pl.program_id(2), (codes, scale, zero)
    coded = _Side(x_codes, sums[0], total).refs(weight, wide, out)
    floats = _Side(kept, sums[1], kept_total).refs(weight, wide, out)

    @pl.when(step == 0)
    def _start():
        by_step(wide, scale[...].astype(jnp.float32))
        total[...] = offset(coded, plan)
        kept_total[...] = offset(floats, plan)

    for first in range(0, plan.blocks.n, plan.blocks.tile):
        accumulate(coded, pl.ds(first, plan.blocks.tile), step, plan)
    for first in range(0, plan.blocks.k, chunk):
        flagged = flags[step * (plan.blocks.k // chunk) + first // chunk] > 0
        pl.when(flagged)(partial(_add_kept, floats, first, chunk, step, plan))

    @pl.when(step == plan.steps - 1)
    def _finish():
        y = total[...] * steps[...] + kept_total[...]
        y = y * wide[0] if plan.late else y
        out[...] = y.astype(out.dtype)


def _add_kept(refs: Refs, first: int, size: int, step: Any, plan: Plan) -> None:
    """Add what the float values of a chunk of inputs give."""
    columns = pl.ds(0, plan.blocks.n)
    q = decode.native(refs.codes, first, size, columns, plan.bits).astype(jnp.bfloat16)
    x, total = refs.x[:, first : first + size], refs.total[...]
    for at in range(0, size, size if plan.late else plan.group):
        stop = size if plan.late else at + plan.group
        y = lax.dot_general(
            x[:, at:stop],
            q[at:stop],
            (((1,), (0,)), ((), ())),
            preferred_element_type=jnp.float32,
        )
        if not plan.late:
            row = (first + at) // plan.group
            y = y * refs.wide[step, row : row + 1, :]
        total = total + y
    refs.total[...] = total


def _operands(
    weight: IntWeight, codes: Any, kept: Any, steps: Any, plan: Plan
) -> tuple[list[Any], list[Any]]:
    """Arrays and how they are cut; scales and zeros are whole along K."""
    m, n, k, G = plan.blocks.m, plan.blocks.n, plan.blocks.k, weight.groups
    stored = k * weight.codes.shape[0] // weight.rows
    by_input = pl.BlockSpec((m, k), lambda i, j, k, _: (i, k))
    per_group = pl.BlockSpec((G, n), lambda i, j, k, _: (0, j))
    half = weight.scale.dtype == jnp.float16
    scale = weight.scale.astype(jnp.float32) if half else weight.scale
    operands = [codes, kept, steps, weight.codes, scale]
    specs = [by_input, by_input, pl.BlockSpec((m, 1), lambda i, j, k, _: (i, 0))]
    specs += [pl.BlockSpec((stored, n), lambda i, j, k, _: (k, j)), per_group]
    if weight.zero is not None:
        whole = weight.zero.dtype == jnp.int8
        operands.append(weight.zero if whole else weight.zero.astype(jnp.float32))
        specs.append(per_group)
    if plan.sums:
        operands += [group_sums(each, weight) for each in (codes, kept)]
        specs += [pl.BlockSpec((m, G), lambda i, j, k, _: (i, 0))] * 2
    return operands, specs


def _padded(x: Any, columns: int) -> Any:
    missing = columns - x.shape[1]
    return jnp.pad(x, ((0, 0), (0, missing))) if missing > 0 else x
