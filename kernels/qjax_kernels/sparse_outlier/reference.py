"""The meaning of the operation: outlier features in float beside int8."""

from typing import Any

import jax
import jax.numpy as jnp

from qjax_kernels.int_matmul.reference import dequantize
from qjax_kernels.int_matmul.weight import IntWeight


def sparse_outlier(
    codes: Any, steps: Any, kept: Any, weight: IntWeight, *, dtype: Any = None
) -> jax.Array:
    """`(codes * steps + kept) @ w`: LLM.int8() (Dettmers et al., 2022, equation 8).

    Args:
      codes: int8 `[M, K]`, 0 in the outlier features.
      steps: float32 `[M, 1]`, what a code of a token is worth.
      kept: float `[M, K]`, the outlier features' values, 0 elsewhere.
      weight: the coded weight.
      dtype: of the result; default that of `kept`.

    Returns:
      `[M, N]`.

    Raises:
      ValueError: shapes or dtypes do not agree.
    """
    check(codes, steps, kept, weight)
    x = codes.astype(jnp.float32) * steps + kept.astype(jnp.float32)
    y = jnp.matmul(x, dequantize(weight), precision="highest")
    return y.astype(kept.dtype if dtype is None else dtype)


def check(codes: Any, steps: Any, kept: Any, weight: IntWeight) -> None:
    """That shapes and dtypes agree.

    Raises:
      ValueError: they do not; the message names the field.
    """
    weight.check(codes)
    if codes.dtype != jnp.int8:
        raise ValueError(f"codes are {codes.dtype.name}; they must be int8")
    for name, value, shape in (
        ("steps", steps, (codes.shape[0], 1)),
        ("kept", kept, codes.shape),
    ):
        if tuple(value.shape) != tuple(shape):
            raise ValueError(f"{name} has shape {value.shape}; it must be {shape}")
