"""`x @ w` with coded floats on a TPU's matrix unit; see `scaled/kernel.py`."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qjax_kernels.compat import chip
from qjax_kernels.float_matmul.blocks import choose
from qjax_kernels.float_matmul.decode import decoder, stands_for_e4m3
from qjax_kernels.float_matmul.reference import result_type
from qjax_kernels.float_matmul.weight import FLOAT8, FloatWeight
from qjax_kernels.scaled import Blocks, Decoder, Operands
from qjax_kernels.scaled.kernel import scaled_matmul


def float_matmul(
    x: Any,
    weight: FloatWeight,
    *,
    generation: str,
    x_scale: Any = None,
    dtype: Any = None,
    blocks: Blocks | None = None,
    interpret: Any = False,
) -> jax.Array:
    """`x_scale * (x[M, K] @ w[K, N])`; see `reference.float_matmul`.

    Float activations are contracted in bfloat16, float8 ones in float8 where their
    elements are the weight's and the generation has them, else in bfloat16. Sums of 4
    bits below `2^-112`, of e4m3 below `2^-118`, may vanish.

    Args:
      x: float, or the float8 codes of tokens.
      weight: the coded weight.
      generation: of the TPU: "v5e", "v5p", "v6e" or "v7x".
      x_scale: float32 `[M, 1]`, the scales of coded tokens.
      dtype: of the result; default that of `x`, float32 for coded tokens.
      blocks: sizes of one grid step; default the table's.
      interpret: as for `pl.pallas_call`.

    Returns:
      `[M, N]`.

    Raises:
      ValueError: shapes or dtypes do not agree, or the blocks need more VMEM than the
        generation has.
    """
    weight.check(x)
    dtype = result_type(x, dtype)
    x, factor, contract = tokens_of(x, weight, generation)
    given, how = operands(weight), decoder(weight.element, generation, contract)
    if blocks is None:
        blocks = choose(generation, x.shape[0], weight, contract != jnp.bfloat16)
    return scaled_matmul(
        x,
        given,
        how,
        blocks,
        generation=generation,
        name=name_of(weight, contract != jnp.bfloat16),
        dtype=dtype,
        row_scale=row_scale(x, weight, x_scale, factor),
        interpret=interpret,
    )


def tokens_of(x: Any, weight: FloatWeight, generation: str) -> tuple[Any, float, Any]:
    """Activations as they are contracted, what is left of their scale, their dtype."""
    coded = x.dtype.itemsize == 1
    if not coded:
        return x.astype(jnp.bfloat16), 1.0, jnp.dtype(jnp.bfloat16)
    if x.dtype == FLOAT8["e4m3"] and stands_for_e4m3(generation):
        bits = lax.bitcast_convert_type(x, jnp.uint8)
        bits = jnp.where(bits == 0x80, jnp.uint8(0), bits)
        same = lax.bitcast_convert_type(bits, FLOAT8["e4m3b11"])
        if weight.element in ("e4m3", "e4m3b11"):
            return same, 16.0, same.dtype
        return same.astype(jnp.bfloat16), 16.0, jnp.dtype(jnp.bfloat16)
    native = chip(generation).is_matmul_supported(x.dtype, x.dtype)
    if FLOAT8.get(weight.element) == x.dtype and native:
        return x, 1.0, x.dtype
    return x.astype(jnp.bfloat16), 1.0, jnp.dtype(jnp.bfloat16)


def row_scale(x: Any, weight: FloatWeight, x_scale: Any, factor: float) -> Any:
    """What multiplies finished sums of every token, float32 `[M, 1]`, or None."""
    if x_scale is None and weight.global_scale is None and factor == 1:
        return None
    scale = jnp.ones((1, 1)) if x_scale is None else x_scale.astype(jnp.float32)
    scale = scale * factor
    if weight.global_scale is not None:
        scale = scale / weight.global_scale
    return jnp.broadcast_to(scale, (x.shape[0], 1))


def operands(weight: FloatWeight) -> Operands:
    """The weight as the shared kernel takes it."""
    scale = weight.scale
    if scale.dtype.name == "float8_e8m0fnu":
        scale = lax.bitcast_convert_type(scale, jnp.uint8)
    group = None if weight.groups == 1 else weight.group
    return Operands(weight.codes, scale, group, weight.K)


def how_decoded(weight: FloatWeight, generation: str, coded: bool) -> Decoder:
    """The decoder, for estimates."""
    kind = FLOAT8[weight.element] if coded else jnp.dtype(jnp.bfloat16)
    return decoder(weight.element, generation, kind)


def name_of(weight: FloatWeight, coded: bool = False) -> str:
    """A name for profiles: `e4m3_a16_channel`, `e2m1_a16_g32`."""
    group = "channel" if weight.groups == 1 else f"g{weight.group}"
    return f"{weight.element}_a{8 if coded else 16}_{group}"
