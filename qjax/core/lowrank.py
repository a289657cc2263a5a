"""Low-rank factors `L[K, r] R[r, N]` of a weight or of its error.

Of all products of rank `r`, those here leave the least of `|D (E - L R)|` in the
Frobenius norm: with `D = 1`, a diagonal, or the root of `E[x x^T]`. By Eckart and
Young that is the truncated singular value decomposition of `D E`, with `D` undone.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from qjax.core.coded import Coded, encode
from qjax.core.formats import Format

Factors = tuple[Any, Any]
"""`L[..., K, r]` and `R[..., r, N]`."""


def best_rank(e: Float32[Array, "... K N"], rank: int) -> Factors:
    """The best product of that rank in the Frobenius norm.

    Both factors have the roots of the singular values.

    Raises:
      ValueError: the matrix has no factors of that rank.
    """
    most = min(e.shape[-2:])
    if rank > most:
        raise ValueError(
            f"rank {rank} is more than a matrix of {e.shape[-2]} x {e.shape[-1]} has; "
            f"take at most {most}, or leave that site out with ignore"
        )
    u, s, v = jnp.linalg.svd(e, full_matrices=False)
    root = jnp.sqrt(s[..., :rank])
    return u[..., :rank] * root[..., None, :], root[..., :, None] * v[..., :rank, :]


def best_for_features(
    e: Float32[Array, "K N"], sizes: Float32[Array, " K"], rank: int
) -> Factors:
    """The best product with the error of each input feature weighed by its size."""
    floor = jnp.max(sizes) * np.float32(1e-4)
    sizes = jnp.maximum(sizes, jnp.where(floor > 0, floor, 1))[:, None]
    left, right = best_rank(sizes * e, rank)
    return left / sizes, right


def best_for_outputs(
    e: Float32[Array, "K N"], moments: Float32[Array, "K K"], rank: int
) -> Factors:
    """The best product for outputs: least `E|x (e - L R)|^2`, from `E[x x^T]`."""
    values, vectors = jnp.linalg.eigh(moments)
    # Directions that no input takes are given a little: the root is inverted.
    floor = jnp.max(values) * np.float32(1e-6)
    roots = jnp.sqrt(jnp.maximum(values, jnp.where(floor > 0, floor, 1)))
    left, right = best_rank((vectors * roots) @ (vectors.T @ e), rank)
    return (vectors / roots) @ (vectors.T @ left), right


def coded_and_best_rank(
    w: Float[Array, "... K N"], format: Format, rank: int, iters: int
) -> tuple[Coded, Any, Any]:
    """Codes and factors in turns: `Q = q(W - L R)`, then `L R` nearest to `W - Q`."""
    exact = w.astype(jnp.float32)
    coded = encode(w, format)
    left, right = best_rank(exact - coded.decode(), rank)
    for _ in range(iters - 1):
        coded = encode((exact - left @ right).astype(w.dtype), format)
        left, right = best_rank(exact - coded.decode(), rank)
    return coded, left, right


def each(
    solve: Callable[[Float[Array, "K N"]], Any], w: Float[Array, "... K N"]
) -> Any:
    """`solve` of one matrix after the other: the same bits in stacks of any height."""
    if w.ndim == 2:
        return solve(w)
    found = jax.lax.map(solve, w.reshape(-1, *w.shape[-2:]))
    return jax.tree.map(lambda x: x.reshape(*w.shape[:-2], *x.shape[1:]), found)


def kept(value: Float[Array, "..."], format: Format | None, dtype: Any) -> Any:
    """A factor as it is stored: coded, or in the type of the weight.

    Scales that have no type of their own have that of the weight.
    """
    if format is None:
        return value.astype(dtype)
    scales: Any = format
    if getattr(format, "scale_dtype", "own") is None and value.dtype != dtype:
        scales = replace(scales, scale_dtype=jnp.dtype(dtype).name)
    return encode(value, scales)
