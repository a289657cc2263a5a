"""`x @ w` with coded levels on a TPU's matrix unit; see `scaled/kernel.py`."""

from typing import Any

import jax
import jax.numpy as jnp

from qjax_kernels import crossing
from qjax_kernels.codebook_matmul.blocks import choose
from qjax_kernels.codebook_matmul.decode import decoder, table
from qjax_kernels.codebook_matmul.weight import CodebookWeight
from qjax_kernels.scaled import Blocks, Operands
from qjax_kernels.scaled.kernel import scaled_matmul


def codebook_matmul(
    x: Any,
    weight: CodebookWeight,
    *,
    generation: str,
    dtype: Any = None,
    blocks: Blocks | None = None,
    interpret: Any = False,
) -> jax.Array:
    """`x[M, K] @ w[K, N]`; see `reference.codebook_matmul`.

    Activations are contracted in bfloat16, with levels rounded to it.

    Args:
      x: float.
      weight: the coded weight.
      generation: of the TPU: "v5e", "v5p", "v6e" or "v7x".
      dtype: of the result; default that of `x`.
      blocks: sizes of one grid step; default the table's.
      interpret: as for `pl.pallas_call`.

    Returns:
      `[M, N]`.

    Raises:
      ValueError: shapes or dtypes do not agree, 3-bit codes do not come in whole
        registers, or the blocks need more VMEM than the generation has.
    """
    weight.check(x)
    cannot = crossing.unfit(weight)
    if cannot:
        raise ValueError(f"CodebookWeight.bits is 3, but {cannot}")
    if blocks is None:
        blocks = choose(generation, x.shape[0], weight)
    return scaled_matmul(
        x.astype(jnp.bfloat16),
        operands(weight),
        decoder(weight.bits),
        blocks,
        generation=generation,
        name=name_of(weight),
        dtype=x.dtype if dtype is None else dtype,
        interpret=interpret,
    )


def operands(weight: CodebookWeight) -> Operands:
    """The weight as the shared kernel takes it."""
    group = None if weight.groups == 1 else weight.group
    levels = table(weight.levels, weight.bits)
    return Operands(weight.codes, weight.scale, group, weight.K, levels)


def name_of(weight: CodebookWeight) -> str:
    """A name for profiles: `codebook4_a16_g64`."""
    group = "channel" if weight.groups == 1 else f"g{weight.group}"
    return f"codebook{weight.bits}_a16_{group}"
