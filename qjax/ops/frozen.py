"""`x @ W` for a weight that is not trained: decoded piece by piece, there and back.

    y[:, n] = x W[:, n],      dx = sum_n dy[:, n] W[:, n]^T

with `n` one piece of the columns after the other. The backward pass needs the codes
alone: neither `x` nor a float weight is kept for it, and no float array of the whole
weight is made in either pass.
"""

from dataclasses import replace
from functools import partial, reduce
from operator import add
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qjax.core.coded import Coded
from qjax.core.qtensor import QTensor, SiteActs
from qjax.ops.kernels import Choice, kernel_product
from qjax.ops.matmul import chosen_for, promoted
from qjax.ops.sums import sums_product

PIECES = 8
LANES = 128  # of a TPU's registers: pieces of whole ones where there are several


def takes(q: QTensor, site: int = 0) -> bool:
    """Whether a leaf is nothing but codes that meet a float activation."""
    bare = q.left is None and q.sparse is None and q.bias is None and not q.moved
    return bare and q.site(site).activation is None and all(map(_pieces, q.parts))


def frozen_matmul(
    x: Float[Array, "*batch M K"],
    q: QTensor,
    *,
    site: int = 0,
    dtype: Any = None,
    weight_dtype: Any = None,
    precision: Any = None,
) -> Float[Array, "*batch M N"]:
    """`qjax.ops.matmul` of a leaf that `takes` accepts; gradients reach `x` alone.

    The forward pass runs a kernel where one suits. Arguments as of `matmul`.
    """
    x = promoted(x, q, weight_dtype)
    dtype = jnp.dtype(x.dtype if dtype is None else dtype)
    chosen = chosen_for(x, q, site, "auto", None)
    pairs = zip(q.parts, chosen)
    return reduce(add, (_product(x, part, dtype, precision, c) for part, c in pairs))


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _product(x: Any, part: Coded, dtype: Any, precision: Any, choice: Choice) -> Any:
    if choice.generation is not None:
        decoded = lambda x, acts, part: _by_piece(x, part, dtype, precision)
        generation = choice.generation
        return kernel_product(x, SiteActs(), part, dtype, generation, decoded)
    if choice.sums:
        return sums_product(x, part, dtype, precision)
    return _by_piece(x, part, dtype, precision)


def _kept(x: Any, part: Coded, *static: Any) -> Any:
    # An empty array carries the activation's dtype.
    return _product(x, part, *static), (part, jnp.zeros((0,), x.dtype))


def _back(dtype: Any, precision: Any, choice: Choice, kept: Any, dy: Any) -> Any:
    part, like = kept
    decoded, count = _piece_of(part, like.dtype), _pieces(part)
    width = part.shape[1] // count

    def add_piece(total: Any, i: Any) -> Any:
        w = jnp.swapaxes(decoded(i), -1, -2)
        each = jax.lax.dynamic_slice_in_dim(dy, i * width, width, -1)
        kind = {"precision": precision, "preferred_element_type": jnp.float32}
        return total + jnp.matmul(each.astype(like.dtype), w, **kind), None

    start = jnp.zeros((*dy.shape[:-1], part.shape[0]), jnp.float32)
    dx, _ = jax.lax.scan(add_piece, start, jnp.arange(count))
    return dx.astype(like.dtype), None


_product.defvjp(_kept, _back)


def _by_piece(x: Any, part: Coded, dtype: Any, precision: Any) -> Any:
    decoded, count = _piece_of(part, x.dtype), _pieces(part)
    dot = partial(jnp.matmul, precision=precision, preferred_element_type=dtype)
    if count == 1:
        return dot(x, decoded(0))
    y = jax.lax.map(lambda i: dot(x, decoded(i)), jnp.arange(count))
    y = jnp.moveaxis(y, 0, -2)  # [*batch, M, pieces, width]
    return y.reshape(*y.shape[:-2], part.shape[1])


def _pieces(part: Coded) -> int:
    """Into how many pieces the columns are cut; 0: packed, or scales not by column."""
    N = part.shape[1]
    if type(part) is not Coded or part.format.granularity.cols not in (1, None):
        return 0
    even = [n for n in range(1, PIECES + 1) if N % n == 0]
    whole = [n for n in even if N // n % LANES == 0]
    return max(whole) if max(whole, default=1) > 1 else max(even)


def _piece_of(part: Coded, dtype: Any) -> Any:
    """`decoded(i)`, the float weight `[..., K, N / pieces]` of one piece."""
    K, N = part.shape
    grid, width = part.grid(), N // _pieces(part)

    def cut(values: Any, i: Any) -> Any:
        if values is None or values.shape[-1] != N or N == 1:
            return values
        return jax.lax.dynamic_slice_in_dim(values, i * width, width, -1)

    def decoded(i: Any) -> Any:
        own = replace(part, codes=cut(part.codes, i), shape=(K, width))
        scales = replace(grid, scale=cut(grid.scale, i), zero=cut(grid.zero, i))
        return part.format.from_codes(own.unpack(), scales).astype(dtype)

    return decoded
