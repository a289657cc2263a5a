"""Linear maps around a quantized weight: `W = T_in Q T_out`.

A transform stands for a square matrix `T`, stored as it is applied to activations:
`t(x)` is `x @ T` for `x[..., M, K]`, `t.left(w)` is `T @ w` for `w[..., K, N]`, and
`t.undone(w)` is `T^-1 @ w`.
Leading axes of the children (layers, experts) line up with those of the operand.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp

from qjax.core.hadamard import small_factor, small_hadamard

Transform = Callable[[Any], Any]


def walsh_hadamard(x: Any) -> Any:
    """Orthonormal Walsh-Hadamard transform of the last axis.

    Of a power of two in Sylvester's order, `H`; of `m` times one, `F (x) H` with the
    matrix `F` of `small_hadamard`. Both are symmetric.

    Raises:
        ValueError: the last axis has another size.
    """
    size = x.shape[-1]
    m = small_factor(size)
    y, half = x, 1
    while half < size // m:
        pairs = y.reshape(*x.shape[:-1], size // (2 * half), 2, half)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        y = jnp.stack((a + b, a - b), axis=-2).reshape(x.shape)
        half *= 2
    if m > 1:
        y = y.reshape(*x.shape[:-1], m, size // m)
        factor = jnp.asarray(small_hadamard(m), x.dtype)
        y = jnp.einsum("...ik,ij->...jk", y, factor, precision="highest")
        y = y.reshape(x.shape)
    return y * jnp.asarray(size**-0.5, x.dtype)


def _swap(x: Any) -> Any:
    return jnp.swapaxes(x, -1, -2)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Diagonal:
    """`T = diag(scale)`, `scale[..., K]`: SmoothQuant, AWQ, SINQ."""

    scale: Any

    def __call__(self, x: Any) -> Any:
        """`x @ T`."""
        return x * self.scale.astype(x.dtype)[..., None, :]

    def left(self, w: Any) -> Any:
        """`T @ w`."""
        return w * self.scale.astype(w.dtype)[..., :, None]

    def undone(self, w: Any) -> Any:
        """`T^-1 @ w`."""
        return w / self.scale.astype(w.dtype)[..., :, None]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Permutation:
    """`(x @ T)[j] = x[index[j]]`, `index[..., K]`: act-order, RPTQ."""

    index: Any

    def __call__(self, x: Any) -> Any:
        """`x @ T`."""
        return jnp.take_along_axis(x, self.index[..., None, :], axis=-1)

    def left(self, w: Any) -> Any:
        """`T @ w`."""
        inverse = jnp.argsort(self.index, axis=-1)
        return jnp.take_along_axis(w, inverse[..., :, None], axis=-2)

    def undone(self, w: Any) -> Any:
        """`T^-1 @ w`."""
        return jnp.take_along_axis(w, self.index[..., :, None], axis=-2)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Hadamard:
    """`T = diag(signs) H / sqrt(K)`, `signs[..., K]` of +-1: QuIP#, QuaRot."""

    signs: Any

    def __call__(self, x: Any) -> Any:
        """`x @ T`."""
        return walsh_hadamard(x * self.signs.astype(x.dtype)[..., None, :])

    def left(self, w: Any) -> Any:
        """`T @ w`."""
        rotated = _swap(walsh_hadamard(_swap(w)))
        return rotated * self.signs.astype(w.dtype)[..., :, None]

    def undone(self, w: Any) -> Any:
        """`T^-1 @ w`."""
        signed = w * self.signs.astype(w.dtype)[..., :, None]
        return _swap(walsh_hadamard(_swap(signed)))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Kronecker:
    """`T = a (x) b`, `a[..., p, p]`, `b[..., q, q]`, `K = p q`: QuIP, FlatQuant."""

    a: Any
    b: Any

    def __call__(self, x: Any) -> Any:
        """`x @ T`."""
        p, q = self.a.shape[-1], self.b.shape[-1]
        grid = x.reshape(*x.shape[:-1], p, q)
        a, b = self.a.astype(x.dtype), self.b.astype(x.dtype)
        return jnp.einsum("...mpq,...pr,...qs->...mrs", grid, a, b).reshape(x.shape)

    def left(self, w: Any) -> Any:
        """`T @ w`."""
        return _swap(Kronecker(_swap(self.a), _swap(self.b))(_swap(w)))

    def undone(self, w: Any) -> Any:
        """`T^-1 @ w`."""
        return Kronecker(jnp.linalg.inv(self.a), jnp.linalg.inv(self.b)).left(w)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Dense:
    """`T = matrix[..., K, K]`: learned rotations."""

    matrix: Any

    def __call__(self, x: Any) -> Any:
        """`x @ T`."""
        return x @ self.matrix.astype(x.dtype)

    def left(self, w: Any) -> Any:
        """`T @ w`."""
        return self.matrix.astype(w.dtype) @ w

    def undone(self, w: Any) -> Any:
        """`T^-1 @ w`."""
        return jnp.linalg.solve(self.matrix.astype(w.dtype), w)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Chain:
    """`T = T_0 T_1 ...`: the first is applied to `x` first."""

    transforms: tuple[Any, ...]

    def __call__(self, x: Any) -> Any:
        """`x @ T`."""
        return reduce(lambda y, t: t(y), self.transforms, x)

    def left(self, w: Any) -> Any:
        """`T @ w`."""
        return reduce(lambda v, t: t.left(v), reversed(self.transforms), w)

    def undone(self, w: Any) -> Any:
        """`T^-1 @ w`."""
        return reduce(lambda v, t: t.undone(v), self.transforms, w)


def chained(*transforms: Any) -> Any:
    """One transform in place of several, of which some may be None."""
    given = [
        t
        for each in transforms
        if each is not None
        for t in (each.transforms if isinstance(each, Chain) else (each,))
    ]
    return None if not given else given[0] if len(given) == 1 else Chain(tuple(given))


TRANSFORMS = (Diagonal, Permutation, Hadamard, Kronecker, Dense, Chain)
