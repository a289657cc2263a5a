"""The Walsh-Hadamard transform of activations on a TPU, with their quantization.

Blocks of 128 features meet a Hadamard matrix on the matrix unit, exactly in bfloat16;
across blocks the transform is additions of whole registers (`butterflies.py`). A step
takes some tokens whole, so that their scales are found before anything is written.
"""

from functools import partial, reduce
from operator import add
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qjax_kernels.compat import chip
from qjax_kernels.hadamard.butterflies import across
from qjax_kernels.hadamard.reference import ONE, matrix, power_of_two
from qjax_kernels.int_matmul.reference import token_scales
from qjax_kernels.scaled.table import sizes

LANES, SUBLANES, MIB = 128, 8, 2**20
SIZES = sizes("hadamard")
TOKENS, GROUP = SIZES["tokens"], SIZES["group"]  # of a step, of what registers hold
MAGIC = 1.5 * 2**23
LEAST_LIMIT = 16 * MIB
ROOM = 4 * MIB


def hadamard(
    x: Any,
    signs: Any = None,
    *,
    generation: str,
    factor: Any = ONE,
    int8: bool = False,
    tokens: int = TOKENS,
    group: int = GROUP,
    interpret: Any = False,
) -> Any:
    """The transform of every token, see `reference.hadamard`.

    Additions are in float32; `x` in float32 is cut into three bfloat16 for the
    products, which loses nothing.

    Args:
      x: bfloat16 or float32 `[M, K]`.
      signs: `[K]` of 1 and -1; None for none.
      generation: of the TPU: "v5e", "v5p", "v6e" or "v7x".
      factor: `[m, m]` of 1 and -1, a numpy array; `K = m 2^k`, and 128 divides `2^k`.
      int8: give int8 codes with one scale per token in place of values.
      tokens: of one grid step.
      group: tokens held in registers at a time; divides `tokens`.
      interpret: as for `pl.pallas_call`.

    Returns:
      `y[M, K]` in the dtype of `x`, or int8 codes `[M, K]` and float32 scales `[M, 1]`.

    Raises:
      ValueError: `x` does not suit, or a step needs more VMEM than the generation has.
    """
    problem = unfit(generation, x, factor, tokens)
    if problem:
        raise ValueError(problem)
    M, K = x.shape
    tokens = tokens if tokens <= M else -(-M // group) * group
    operands = [x, jnp.asarray(matrix(LANES), jnp.bfloat16)]
    by_token = pl.BlockSpec((tokens, K), lambda i: (i, 0))
    specs = [by_token, pl.BlockSpec((LANES, LANES), lambda i: (0, 0))]
    if signs is not None:
        operands.append(signs.astype(jnp.float32).reshape(1, K))
        specs.append(pl.BlockSpec((1, K), lambda i: (0, 0)))
    shapes = [jax.ShapeDtypeStruct((M, K), jnp.int8 if int8 else x.dtype)]
    out = [by_token]
    if int8:
        shapes.append(jax.ShapeDtypeStruct((M, 1), jnp.float32))
        out.append(pl.BlockSpec((tokens, 1), lambda i: (i, 0)))
    found = pl.pallas_call(
        partial(
            _kernel, factor=factor, group=group, signed=signs is not None, int8=int8
        ),
        grid=(pl.cdiv(M, tokens),),
        in_specs=specs,
        out_specs=out,
        out_shape=shapes,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",),
            vmem_limit_bytes=max(
                LEAST_LIMIT, vmem_bytes(x, tokens, group) // MIB * MIB + ROOM
            ),
        ),
        interpret=interpret,
        name=name_of(int8),
    )(*operands)
    return tuple(found) if int8 else found[0]


def name_of(int8: bool) -> str:
    """A name for profiles."""
    return "hadamard_int8" if int8 else "hadamard"


def unfit(generation: str, x: Any, factor: Any = ONE, tokens: int = TOKENS) -> str:
    """Why the kernel does not take `x`; empty if it does.

    Raises:
      ValueError: unknown generation, or `K` is no power of two times the factor's size.
    """
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        return f"x is {x.dtype.name}; the kernel transforms bfloat16 and float32"
    K = x.shape[1]
    if power_of_two(K, factor) % LANES:
        return (
            f"x has {K} features, {K // factor.shape[0]} for each row of the factor; "
            f"the kernel needs multiples of {LANES}"
        )
    capacity = chip(generation).vmem_capacity_bytes
    needed = vmem_bytes(x, tokens, GROUP) + ROOM
    if needed > capacity:
        return (
            f"{tokens} tokens of {K} features need about {needed / MIB:.0f} MiB of "
            f"VMEM; {generation} has {capacity / MIB:.0f} MiB"
        )
    return ""


def vmem_bytes(x: Any, tokens: int, group: int) -> int:
    """VMEM of one step: double-buffered blocks, and a group of tokens in float32."""
    K = x.shape[1]
    return 4 * tokens * K * x.dtype.itemsize + 4 * group * K * 4


def _kernel(*refs: Any, factor: np.ndarray, group: int, signed: bool, int8: bool):
    """Some tokens, a group at a time."""
    left = list(refs)
    x, turn = left.pop(0), left.pop(0)
    signs = left.pop(0)[...] if signed else None

    def one(at: Any, carry: None) -> None:
        rows = pl.ds(at * group, group)
        y = _transformed(x[rows, :], signs, turn[...], factor)
        if int8:
            scale = token_scales(y)
            left[0][rows, :], left[1][rows, :] = _codes(y, scale), scale
        else:
            left[0][rows, :] = y.astype(left[0].dtype)

    lax.fori_loop(0, x.shape[0] // group, one, None)


def _transformed(x: Any, signs: Any, turn: Any, factor: np.ndarray) -> Any:
    """The transform of `x[rows, K]`, float32."""
    rows, K = x.shape
    x = x if signs is None else (x.astype(jnp.float32) * signs).astype(x.dtype)
    # Blocks of features under each other: the matrix is loaded once for all.
    tall = jnp.concatenate([x[:, at : at + LANES] for at in range(0, K, LANES)])
    first, *others = (_dot(piece, turn) for piece in _pieces(tall))
    tall = reduce(add, others, first)
    # A register of tokens after another: all of its blocks are held at once.
    starts = range(0, rows * (K // LANES), rows)
    y = jnp.concatenate(
        [
            jnp.concatenate(
                across([tall[at + r : at + r + SUBLANES] for at in starts], factor),
                axis=1,
            )
            for r in range(0, rows, SUBLANES)
        ]
    )
    return y * np.float32(K**-0.5)


def _codes(y: Any, scale: Any) -> Any:
    """int8 codes; a product with the reciprocal differs from the quotient at ties.

    Added to `MAGIC`, a number is rounded to the nearest whole one by the addition
    itself, and the lowest byte of the sum is that number.
    """
    sums = jnp.minimum(y * (1 / scale), 127) + jnp.float32(MAGIC)
    return lax.bitcast_convert_type(sums, jnp.int32).astype(jnp.int8)


def _pieces(x: Any) -> list[Any]:
    """`x` as a sum of bfloat16 arrays."""
    if x.dtype == jnp.bfloat16:
        return [x]
    found = []
    for _ in range(3):
        found.append(x.astype(jnp.bfloat16))
        x = x - found[-1].astype(jnp.float32)
    return found


def _dot(x: Any, y: Any) -> Any:
    return lax.dot_general(
        x, y, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32
    )
