"""The meaning of the operation: grouped products with integer codes, in plain JAX."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from qjax_kernels.int_matmul.reference import dequantize, quantize_tokens
from qjax_kernels.int_matmul.weight import IntWeight


def ragged_matmul(
    x: Any,
    experts: IntWeight,
    sizes: Any,
    *,
    int8_tokens: bool = False,
    dtype: Any = None,
) -> jax.Array:
    """Rows of `x[M, K]`, sorted by expert, times theirs of `w[E, K, N]`.

    Args:
      x: float.
      experts: every child has a leading axis of experts.
      sizes: int32 `[E]`, rows of each expert, none below 0; rows after all of them
        give zeros.
      int8_tokens: contract `x` as int8 codes with one scale per token.
      dtype: of the result; default that of `x`.

    Returns:
      `[M, N]`.

    Raises:
      ValueError: shapes or dtypes do not agree.
    """
    check(x, experts, sizes)
    dtype = x.dtype if dtype is None else dtype
    x = x.astype(jnp.float32) if not int8_tokens else x
    if int8_tokens:
        codes, scale = quantize_tokens(x)
        x = codes.astype(jnp.float32) * scale
    w = jax.vmap(dequantize)(experts)
    y = jax.lax.ragged_dot(x, w, sizes, precision=jax.lax.Precision.HIGHEST)
    return y.astype(dtype)


def check(x: Any, experts: IntWeight, sizes: Any) -> None:
    """That shapes and dtypes agree.

    Raises:
      ValueError: they do not; the message names the field.
    """
    if experts.codes.ndim != 3:
        raise ValueError(
            f"IntWeight.codes has shape {experts.codes.shape}; experts lead three axes"
        )
    one_expert(experts).check(x)
    E = experts.codes.shape[0]
    counts = {"codes": E, "scale": experts.scale.shape[0]}
    if experts.zero is not None:
        counts["zero"] = experts.zero.shape[0]
    wrong = [name for name, count in counts.items() if count != E]
    if wrong:
        raise ValueError(
            f"IntWeight.{wrong[0]} has {counts[wrong[0]]} experts; codes have {E}"
        )
    if tuple(sizes.shape) != (E,) or sizes.dtype != jnp.int32:
        raise ValueError(
            f"sizes is {sizes.dtype.name}{list(sizes.shape)}; it must be int32[{E}]"
        )


def one_expert(experts: IntWeight) -> IntWeight:
    """The shapes of one expert."""

    def shape(value: Any) -> Any:
        return jax.ShapeDtypeStruct(value.shape[1:], value.dtype)

    return replace(
        experts,
        codes=shape(experts.codes),
        scale=shape(experts.scale),
        zero=None if experts.zero is None else shape(experts.zero),
    )
