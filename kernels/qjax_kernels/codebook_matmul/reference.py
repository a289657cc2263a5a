"""The meaning of the operation: `x @ w` with coded levels, in plain JAX."""

from typing import Any

import jax
import jax.numpy as jnp

from qjax_kernels.codebook_matmul.weight import WORD, CodebookWeight


def indices(weight: CodebookWeight) -> jax.Array:
    """The codes, int32 `[K, N]`; they may cross words."""
    first = jnp.arange(weight.K) * weight.bits
    word, shift = first // WORD, (first % WORD).astype(jnp.uint32)[:, None]
    low = weight.codes[word] >> shift
    following = weight.codes[jnp.minimum(word + 1, weight.codes.shape[0] - 1)]
    # Shifted in two steps, because a shift by a whole word is not defined.
    high = (following << (WORD - 1 - shift)) << jnp.uint32(1)
    return ((low | high) & jnp.uint32(2**weight.bits - 1)).astype(jnp.int32)


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
