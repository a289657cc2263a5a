"""The meaning of the operation: `x @ w` with coded floats, in plain JAX."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax_kernels.coded import WORD
from qjax_kernels.float_matmul.weight import FloatWeight

E2M1 = np.asarray([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
"""OCP's 4-bit floats by their lower three bits; the fourth is the sign."""


def elements(weight: FloatWeight) -> jax.Array:
    """The coded numbers, float32 `[K, N]`."""
    if weight.element != "e2m1":
        return weight.codes.astype(jnp.float32)
    shifts = jnp.arange(0, WORD, 4, dtype=jnp.uint32)
    patterns = (weight.codes[:, None, :] >> shifts[:, None]) & jnp.uint32(15)
    patterns = patterns.reshape(-1, weight.N)[: weight.K].astype(jnp.int32)
    return jnp.asarray(np.concatenate([E2M1, -E2M1]))[patterns]


def scales(weight: FloatWeight) -> jax.Array:
    """What multiplies elements, float32 `[G, N]`."""
    scale = weight.scale.astype(jnp.float32)
    return scale if weight.global_scale is None else scale / weight.global_scale


def dequantize(weight: FloatWeight) -> jax.Array:
    """`w[K, N]` in float32."""
    each = jnp.repeat(scales(weight), weight.group or weight.K, axis=0)
    return elements(weight) * each[: weight.K]


def float_matmul(
    x: Any, weight: FloatWeight, *, x_scale: Any = None, dtype: Any = None
) -> jax.Array:
    """`x_scale * (x[M, K] @ w[K, N])`.

    Args:
      x: float, or the float8 codes of tokens.
      weight: the coded weight.
      x_scale: `[M, 1]`, the scales of coded tokens.
      dtype: of the result; default that of `x`, float32 for coded tokens.

    Returns:
      `[M, N]`.

    Raises:
      ValueError: shapes or dtypes do not agree.
    """
    weight.check(x)
    y = jnp.matmul(x.astype(jnp.float32), dequantize(weight), precision="highest")
    y = y if x_scale is None else y * x_scale
    return y.astype(result_type(x, dtype))


def result_type(x: Any, dtype: Any) -> Any:
    """The dtype of the result."""
    if dtype is not None:
        return jnp.dtype(dtype)
    return jnp.dtype(jnp.float32 if x.dtype.itemsize == 1 else x.dtype)
