"""The gradient by activations of a weight-only product, on the kernels."""

from typing import Any

import jax
import jax.numpy as jnp

from qjax.core.coded import Coded
from qjax.core.formats import Codebook, Int
from qjax_kernels import crossing
from qjax_kernels.codebook_matmul import backward_tpu as codebook_tpu
from qjax_kernels.int_matmul import IntWeight
from qjax_kernels.int_matmul import backward_tpu as int_tpu
from qjax_kernels.scaled.operands import too_large
from qjax_kernels.scaled.transposed import BLOCKS, fitted

MOST_TOKENS = {"v6e": 1024, "v7x": 1024}
"""Beyond, decoding once for all tokens, as XLA does, costs less by the schedules."""


def unfit_backward(part: Coded, weight: Any, dy: Any, generation: str) -> str:
    """Why no kernel computes `dy @ w^T`; empty if one does.

    Args:
      part: of the leaf.
      weight: the same as its forward kernel takes it, or shapes.
      dy: `[M, N]`, or its shape.
      generation: of the TPU.
    """
    if not isinstance(part.format, Int | Codebook):
        return f"no backward kernel for {part.format.name}"
    if part.format.bits == crossing.BITS:
        return f"no backward kernel for {part.format.name}"
    if dy.dtype != jnp.bfloat16:
        return f"the backward kernel contracts bfloat16, not {dy.dtype.name}"
    most = MOST_TOKENS.get(generation, dy.shape[0])
    if dy.shape[0] > most:
        return f"beyond {most} tokens XLA, which decodes once for all, takes less time"
    kernel = int_tpu if isinstance(weight, IntWeight) else codebook_tpu
    given = jax.eval_shape(kernel.operands, weight)
    decoder = kernel.decoder(weight.bits)
    blocks = fitted(BLOCKS, dy.shape[0], given, decoder)
    return too_large(generation, blocks, given, decoder, 2)


def backward_product(dy: Any, weight: Any, dtype: Any, generation: str) -> jax.Array:
    """`dy[M, N] @ w^T`, `[M, K]`."""
    if isinstance(weight, IntWeight):
        return int_tpu.int_matmul_backward(
            dy, weight, generation=generation, dtype=dtype
        )
    return codebook_tpu.codebook_matmul_backward(
        dy, weight, generation=generation, dtype=dtype
    )
