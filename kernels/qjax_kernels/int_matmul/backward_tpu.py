"""`dy @ w^T` with integer codes on a TPU; see `scaled/transposed.py`."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax_kernels.coded import WORD
from qjax_kernels.int_matmul import decode
from qjax_kernels.int_matmul.weight import IntWeight
from qjax_kernels.scaled import Blocks, Decoder, Operands
from qjax_kernels.scaled.transposed import BLOCKS, transposed_matmul


def int_matmul_backward(
    dy: Any,
    weight: IntWeight,
    *,
    generation: str,
    dtype: Any = None,
    blocks: Blocks = BLOCKS,
    interpret: Any = False,
) -> jax.Array:
    """The gradient by `x` of `x[M, K] @ w[K, N]`: `dy[M, N] @ w^T`.

    Contracted in bfloat16, with weights rounded to it, as they are in XLA's form.

    Args:
      dy: float.
      weight: the coded weight.
      generation: of the TPU: "v5e", "v5p", "v6e" or "v7x".
      dtype: of the result; default that of `dy`.
      blocks: sizes of one grid step.
      interpret: as for `pl.pallas_call`.

    Returns:
      `[M, K]`.

    Raises:
      ValueError: the blocks need more VMEM than the generation has.
    """
    return transposed_matmul(
        dy,
        operands(weight),
        decoder(weight.bits),
        blocks,
        generation=generation,
        name=name_of(weight),
        dtype=dy.dtype if dtype is None else dtype,
        zero=weight.zero,
        interpret=interpret,
    )


def operands(weight: IntWeight) -> Operands:
    """The weight as the shared kernel takes it."""
    group = None if weight.groups == 1 else weight.group
    return Operands(weight.codes, weight.scale, group, weight.K)


def decoder(bits: int) -> Decoder:
    """Signed codes in bfloat16, in their own order."""
    return Decoder(
        partial(native, bits=bits),
        lambda size: np.arange(size)[None],
        WORD // bits if bits < 8 else 1,
    )


def native(
    codes: Any, table: Any, first: int, size: int, columns: Any, bits: int
) -> list[Any]:
    """What the hardware converts by itself."""
    return [decode.native(codes, first, size, columns, bits).astype(jnp.bfloat16)]


def name_of(weight: IntWeight) -> str:
    """A name for profiles: `w4_g128_zero_backward`."""
    group = "channel" if weight.groups == 1 else f"g{weight.group}"
    zero = "" if weight.zero is None else "_zero"
    return f"w{weight.bits}_{group}{zero}_backward"
