"""The meaning of the operation: a Hadamard transform of every token."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax_kernels.int_matmul.reference import quantize_tokens

ONE = np.ones((1, 1), np.int8)


def matrix(size: int, factor: Any = ONE) -> np.ndarray:
    """`factor (x) H` with `size` rows, `H` Sylvester's matrix of a power of two.

    Raises:
      ValueError: `size` is not a power of two times the factor's.
    """
    power = power_of_two(size, factor)
    found, two = np.asarray(factor, np.int8), np.array([[1, 1], [1, -1]], np.int8)
    for _ in range(power.bit_length() - 1):
        found = np.kron(found, two)
    return found


def power_of_two(size: int, factor: Any) -> int:
    """`size` over the factor's size, a power of two.

    Raises:
      ValueError: it is none.
    """
    power, left = divmod(size, factor.shape[0])
    if left or power < 1 or power & (power - 1):
        raise ValueError(
            f"x has {size} features; a Hadamard matrix of {factor.shape[0]} needs a "
            "power of two times as many"
        )
    return power


def hadamard(
    x: Any, signs: Any = None, *, factor: Any = ONE, int8: bool = False
) -> Any:
    """`y = (x * signs) (factor (x) H) / sqrt(K)`, and its codes.

    Args:
      x: float `[M, K]`.
      signs: `[K]` of 1 and -1; None for none.
      factor: `[m, m]` of 1 and -1 with orthogonal rows, `K = m 2^k`; default `[[1]]`.
      int8: give int8 codes with one scale per token in place of values.

    Returns:
      `y[M, K]` in the dtype of `x`, or int8 codes `[M, K]` and float32 scales `[M, 1]`
      of `y` in float32.

    Raises:
      ValueError: `K` is no power of two times `m`.
    """
    K = x.shape[1]
    wide = x.astype(jnp.float32)
    wide = wide if signs is None else wide * signs.astype(jnp.float32)
    turned = jnp.asarray(matrix(K, factor), jnp.float32) * np.float32(K**-0.5)
    y = jnp.matmul(wide, turned, precision=jax.lax.Precision.HIGHEST)
    return quantize_tokens(y) if int8 else y.astype(x.dtype)
