"""AQLM: vectors of inputs as sums of code vectors (Egiazarian et al., 2024).

https://arxiv.org/abs/2401.06118, equation 4: `w[d j : d (j + 1), n] = s_n sum_c
C_c[b_{c,j,n}]`. 1x16 is one codebook of 65536 vectors, 2x8 two of 256. There is no
Pallas kernel: neither Mosaic has a gather from a table of a megabyte, and the tables
themselves do not fit a register. The two forms here are plain JAX.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class AdditiveWeight:
    """A pytree of codes and codebooks.

    Attributes:
      codes: `[C, K/d, N]`, uint8 or uint16.
      codebooks: `[C, entries, d]`, float.
      scale: float `[1, N]`.
    """

    codes: Any
    codebooks: Any
    scale: Any

    @property
    def K(self) -> int:
        """Number of inputs."""
        return self.codes.shape[1] * self.codebooks.shape[2]

    @property
    def N(self) -> int:
        """Number of outputs."""
        return self.codes.shape[2]


jax.tree_util.register_dataclass(AdditiveWeight, ["codes", "codebooks", "scale"], [])


def dequantize(weight: AdditiveWeight) -> jax.Array:
    """`w[K, N]` in float32."""
    books = weight.codebooks.astype(jnp.float32)
    vectors = sum(
        book[codes.astype(jnp.int32)] for book, codes in zip(books, weight.codes)
    )
    w = jnp.swapaxes(jnp.asarray(vectors), 1, 2).reshape(weight.K, weight.N)
    return w * weight.scale.astype(jnp.float32)


def additive_matmul(x: Any, weight: AdditiveWeight, *, dtype: Any = None) -> jax.Array:
    """`x[M, K] @ w[K, N]`: the meaning; the float weight is written out once."""
    y = jnp.matmul(x.astype(jnp.float32), dequantize(weight), precision="highest")
    return y.astype(x.dtype if dtype is None else dtype)


def products_first(x: Any, weight: AdditiveWeight, *, dtype: Any = None) -> jax.Array:
    """The same from products of `x` with every code vector, for few tokens and 2x8.

    `y_mn = s_n sum_{c,j} P[m, c, j, b_{c,j,n}]`, `P = x_mj . C_c`: `K C entries`
    products for each token instead of `K N`, and a lookup for every code.
    """
    M, d = x.shape[0], weight.codebooks.shape[2]
    vectors = x.astype(jnp.float32).reshape(M, -1, d)
    table = jnp.einsum(
        "mjd,ced->mcje",
        vectors,
        weight.codebooks.astype(jnp.float32),
        precision="highest",
    )
    codes = jnp.broadcast_to(weight.codes.astype(jnp.int32), (M, *weight.codes.shape))
    found = jnp.take_along_axis(table, codes, axis=3)
    y = found.sum((1, 2)) * weight.scale.astype(jnp.float32)
    return y.astype(x.dtype if dtype is None else dtype)
