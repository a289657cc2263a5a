"""`x @ W` for a weight that is not trained: decoded piece by piece, there and back.

With `y = ((x T_in) @ (sum Q_i + L R)) T_out + b`, codes `Q_i` that meet a float input
are decoded a few columns at a time (`qjax/ops/pieces.py`) in both passes, and codes
that meet a coded input in the backward pass, which is straight through the rounding.
The backward pass needs the codes, and of a coded input the input itself: no float
weight is kept for it, and no float array of the whole weight is made in either pass.

Limits: outliers `S` are spread over a float matrix (`takes` refuses them); a kernel, or
a TPU's form with scales on sums, decodes as it multiplies; a GPU's form for narrow
weights does so if it is compiled with `GPU_COMPILER_OPTIONS`, and writes the decoded
weight without them; of experts a piece is as large as one, or 128 columns of all.
"""

from functools import partial, reduce
from operator import add
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from qjax.core.qtensor import QTensor, SiteActs, factor
from qjax.ops import pieces
from qjax.ops.activations import coded_values, of_rows
from qjax.ops.kernels import Choice
from qjax.ops.matmul import chosen_for, product_of, promoted, rotation_for
from qjax.ops.outliers import split_outliers
from qjax.ops.ragged import ragged_chosen_for, ragged_product_of


def takes(q: QTensor) -> bool:
    """Whether a leaf can be decoded piece by piece: it has no outliers `S`."""
    return q.sparse is None


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
    turning = rotation_for(x, q, site, "auto", None)
    generation = None if turning is None else turning.generation
    return _product(x, q, site, dtype, precision, chosen, generation)


def frozen_ragged(
    x: Float[Array, "M K"],
    q: QTensor,
    group_sizes: Int[Array, " E"],
    *,
    site: int = 0,
    dtype: Any = None,
    weight_dtype: Any = None,
    precision: Any = None,
) -> Float[Array, "M N"]:
    """`qjax.ops.ragged_matmul` of experts that are only coded; as `frozen_matmul`."""
    x = promoted(x, q, weight_dtype)
    dtype = jnp.dtype(x.dtype if dtype is None else dtype)
    chosen = ragged_chosen_for(x, q, site, "auto", None)
    return _experts(x, q, group_sizes, site, dtype, precision, chosen.generation)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5, 6))
def _product(
    x: Any,
    q: QTensor,
    site: int,
    dtype: Any,
    precision: Any,
    chosen: tuple[Choice, ...],
    turning: str | None,
) -> Any:
    return product_of(x, q, site, dtype, precision, chosen, turning, True)


def _kept(x: Any, acts: SiteActs) -> Any:
    """What the backward pass needs of the input; an empty array carries its dtype."""
    return jnp.zeros((0,), x.dtype) if acts.activation is None else x


def _product_kept(x: Any, q: QTensor, site: int, *static: Any) -> Any:
    return _product(x, q, site, *static), (_kept(x, q.site(site)), q)


def _product_back(
    site: int, dtype: Any, precision: Any, chosen: Any, turning: Any, kept: Any, dy: Any
) -> Any:
    x, q = kept
    acts, like = q.site(site), x.dtype
    wide = {"precision": precision, "preferred_element_type": jnp.float32}
    dot = partial(jnp.matmul, **wide)
    dy = _through(acts.t_out, dy, q.layout.N)
    terms = [pieces.backward(dot, dy, part, like) for part in q.parts]
    dx = reduce(add, terms).astype(like) if terms else None
    if acts.activation is not None and dx is not None:
        inner = x if acts.t_in is None else acts.t_in(x)
        dx = jax.vjp(partial(_values, acts), inner)[1](dx)[0]
    if q.left is not None:
        left, right = (jnp.swapaxes(factor(f, like), -1, -2) for f in (q.left, q.right))
        branch = dot(dot(dy.astype(like), right).astype(like), left).astype(like)
        dx = branch if dx is None else dx + branch
    return _through(acts.t_in, dx, q.layout.K), None


_product.defvjp(_product_kept, _product_back)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def _experts(
    x: Any,
    q: QTensor,
    sizes: Any,
    site: int,
    dtype: Any,
    precision: Any,
    generation: str | None,
) -> Any:
    return ragged_product_of(x, q, sizes, site, dtype, precision, generation, True)


def _experts_kept(x: Any, q: QTensor, sizes: Any, site: int, *static: Any) -> Any:
    return _experts(x, q, sizes, site, *static), (_kept(x, q.site(site)), q, sizes)


def _experts_back(
    site: int, dtype: Any, precision: Any, generation: Any, kept: Any, dy: Any
) -> Any:
    x, q, sizes = kept
    wide = {"precision": precision, "preferred_element_type": jnp.float32}
    dot = partial(jax.lax.ragged_dot, group_sizes=sizes, **wide)
    terms = [pieces.backward(dot, dy, part, x.dtype) for part in q.parts]
    dx = reduce(add, terms).astype(x.dtype)
    acts = q.site(site)
    if acts.activation is not None:
        rows = of_rows(acts, sizes, x.shape[0])
        dx = jax.vjp(partial(coded_values, acts=rows), x)[1](dx)[0]
    return dx, None, None


_experts.defvjp(_experts_kept, _experts_back)


def _values(acts: SiteActs, x: Any) -> Any:
    """What codes stand for, and features that stay in float."""
    x, beside, acts = split_outliers(x, acts)
    values = coded_values(x, acts)
    return values if beside is None else values + beside


def _through(transform: Any, dy: Any, size: int) -> Any:
    """`dy @ T^T`, of `size` features."""
    if transform is None:
        return dy
    like = jax.ShapeDtypeStruct((*dy.shape[:-1], size), dy.dtype)
    return jax.linear_transpose(transform, like)(dy)[0]
