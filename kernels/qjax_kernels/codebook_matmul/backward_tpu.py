"""`dy @ w^T` with coded levels on a TPU; see `scaled/transposed.py`."""

from typing import Any

import jax

from qjax_kernels.codebook_matmul.decode import decoder
from qjax_kernels.codebook_matmul.pallas_tpu import name_of, operands
from qjax_kernels.codebook_matmul.weight import CodebookWeight
from qjax_kernels.scaled import Blocks
from qjax_kernels.scaled.transposed import BLOCKS, transposed_matmul


def codebook_matmul_backward(
    dy: Any,
    weight: CodebookWeight,
    *,
    generation: str,
    dtype: Any = None,
    blocks: Blocks = BLOCKS,
    interpret: Any = False,
) -> jax.Array:
    """The gradient by `x` of `x[M, K] @ w[K, N]`: `dy[M, N] @ w^T`.

    Contracted in bfloat16; levels are rounded to it, and then weights.

    Args:
      dy: float.
      weight: the coded weight, of 2 or 4 bits.
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
        name=f"{name_of(weight)}_backward",
        dtype=dy.dtype if dtype is None else dtype,
        interpret=interpret,
    )
