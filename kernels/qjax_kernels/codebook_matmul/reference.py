"""The meaning of the operation: `x @ w` with coded levels, in plain JAX."""

from typing import Any

import jax
import jax.numpy as jnp

from qjax_kernels.codebook_matmul.weight import CodebookWeight
from qjax_kernels.coded import unpacked


def indices(weight: CodebookWeight) -> jax.Array:
    """The codes, int32 `[K, N]`; they may cross words."""
    return unpacked(weight.codes, weight.bits, weight.K).astype(jnp.int32)


def dequantize(weight: CodebookWeight) -> jax.Array:
    """`w[K, N]` in float32."""
    scale = weight.scale.astype(jnp.float32)
    each = jnp.repeat(scale, weight.group or weight.K, axis=0)[: weight.K]
    return weight.levels.astype(jnp.float32)[indices(weight)] * each


def codebook_matmul(x: Any, weight: CodebookWeight, *, dtype: Any = None) -> jax.Array:
    """`x[M, K] @ w[K, N]`.

    Args:
      x: float.
      weight: the coded weight.
      dtype: of the result; default that of `x`.

    Returns:
      `[M, N]`.

    Raises:
      ValueError: shapes or dtypes do not agree.
    """
    weight.check(x)
    y = jnp.matmul(x.astype(jnp.float32), dequantize(weight), precision="highest")
    return y.astype(x.dtype if dtype is None else dtype)
