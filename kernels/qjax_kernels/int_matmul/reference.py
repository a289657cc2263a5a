"""The meaning of the operation: `x @ w` with integer codes, in plain JAX."""

from typing import Any

import jax
import jax.numpy as jnp

from qjax_kernels.int_matmul.weight import IntWeight, signed_codes

HALF_RANGE = 127.5  # of int8: compressed-tensors' rule, absmax / ((2^8 - 1) / 2)


def dequantize(weight: IntWeight, dtype: Any = jnp.float32) -> jax.Array:
    """`w[K, N] = (q - zero) * scale`, computed in `dtype`."""
    group = weight.group or weight.K

    def spread(values: Any) -> jax.Array:
        return jnp.repeat(values.astype(dtype), group, axis=0)[: weight.K]

    q = signed_codes(weight).astype(dtype)
    q = q if weight.zero is None else q - spread(weight.zero)
    return q * spread(weight.scale)


def quantize_tokens(x: Any) -> tuple[jax.Array, jax.Array]:
    """int8 codes `[M, K]` of `x[M, K]` and one scale per token, `float32[M, 1]`.

    Scales are rounded to the dtype of `x` and are normal numbers there, so that no
    finite input becomes a NaN; a token of zeros has the dtype's epsilon.
    """
    scale = token_scales(x)
    codes = jnp.round(_divide(x.astype(jnp.float32), scale))
    return jnp.clip(codes, -128, 127).astype(jnp.int8), scale


def token_scales(x: Any) -> jax.Array:
    """The scales of `quantize_tokens`."""
    limits = jnp.finfo(x.dtype)
    x = x.astype(jnp.float32)
    absmax = jnp.max(jnp.abs(x), axis=1, keepdims=True)
    scale = _divide(absmax, jnp.float32(HALF_RANGE))
    scale = scale.astype(limits.dtype).astype(jnp.float32)
    # The largest code times the scale stays finite.
    scale = jnp.clip(scale, float(limits.tiny), float(limits.max) / 128)
    return jnp.where(absmax == 0, float(limits.eps), scale)


def _divide(x: Any, y: Any) -> Any:
    """`x / y`, correctly rounded: XLA would multiply by a reciprocal of `y` alone."""
    return x / jnp.where(jnp.isnan(x), x, y)


def int_matmul(
    x: Any, weight: IntWeight, *, int8_tokens: bool = False, dtype: Any = None
) -> jax.Array:
    """`x[M, K] @ w[K, N]`.

    Args:
      x: float.
      weight: the coded weight.
      int8_tokens: contract `x` as int8 codes with one scale per token.
      dtype: of the result; default that of `x`.

    Returns:
      `[M, N]`.

    Raises:
      ValueError: shapes or dtypes do not agree.
    """
    weight.check(x)
    dtype = x.dtype if dtype is None else dtype
    if int8_tokens:
        codes, scale = quantize_tokens(x)
        x = codes.astype(jnp.float32) * scale
    y = jnp.matmul(x.astype(jnp.float32), dequantize(weight), precision="highest")
    return y.astype(dtype)
