"""`x @ W` for a QTensor: the XLA form, and the choice of an implementation."""

from functools import partial, reduce
from operator import add
from typing import Any

import jax
import jax.numpy as jnp

from qjax.core.coded import Coded
from qjax.core.formats import Float, Int
from qjax.core.qtensor import QTensor, SiteActs
from qjax.core.scales import Grid
from qjax.ops import pieces
from qjax.ops.activations import (
    CodedInput,
    code_input,
    coded_values,
    contraction,
    integers,
)
from qjax.ops.elements import elements_choice, elements_product
from qjax.ops.kernels import Choice, check_implementation, choices, kernel_product
from qjax.ops.narrow import coded_narrow_product, narrow_product
from qjax.ops.outliers import kept_product, split_outliers
from qjax.ops.packed import ROWS, Packed
from qjax.ops.rotations import rotation_choice, turned
from qjax.ops.sums import coded_sums_product, sums_product
from qjax.ops.targets import Target, here
from qjax.ops.vectors import vectors_product


def matmul(
    x: Any,
    q: QTensor,
    *,
    site: int = 0,
    dtype: Any = None,
    weight_dtype: Any = None,
    precision: Any = None,
    implementation: str = "auto",
    target: Target | None = None,
) -> jax.Array:
    """`y = ((x T_in) @ (sum Q_i + L R + S)) T_out + b`.

    An input that is coded meets `Q_i` and `S` as its codes say, and `L R` as it is.

    Args:
      x: `[*batch, M, K]`; the batch axes are those of `q.lead`.
      q: weight with `(K, N)`.
      site: position among the leaf's sites, for its activation record.
      dtype: of the result; default that of the operands.
      weight_dtype: of the float weight that `q` stands for; the contraction is done in
        what it and `x` promote to. Default: that of `x`, or the leaf's if `x` is whole
        numbers.
      precision: of the float contractions, as in `lax.dot_general`.
      implementation: "auto": a Pallas kernel where one suits, else XLA; "xla"; or
        "pallas": a kernel or an error.
      target: hardware to choose for; default this process's.

    Returns:
      `[*batch, M, N]`.

    Raises:
      ValueError: unknown implementation, no kernel for "pallas", or a static activation
        without a scale.
    """
    x = promoted(x, q, weight_dtype)
    dtype = jnp.dtype(x.dtype if dtype is None else dtype)
    chosen = chosen_for(x, q, site, implementation, target)
    turning = rotation_for(x, q, site, implementation, target)
    elements = elements_choice(q, x, implementation, target or here())
    turn, put = (None if c is None else c.generation for c in (turning, elements))
    return product_of(x, q, site, dtype, precision, chosen, turn, False, put)


def chosen_for(
    x: Any, q: QTensor, site: int, implementation: str, target: Target | None
) -> tuple[Choice, ...]:
    """How each part of the weight runs.

    Raises:
      ValueError: unknown implementation, or no kernel for "pallas".
    """
    check_implementation(implementation)
    return choices(q, site, x, implementation, here() if target is None else target)


def rotation_for(
    x: Any, q: QTensor, site: int, implementation: str, target: Target | None
) -> Choice | None:
    """How a Hadamard transform of the input runs; None where there is none."""
    transform = q.site(site).t_in
    if transform is None:
        return None
    return rotation_choice(
        transform, x, implementation, here() if target is None else target
    )


def promoted(x: Any, q: QTensor, weight_dtype: Any) -> Any:
    """`x` in the dtype in which it meets the weight."""
    if weight_dtype is None:
        weight_dtype = x.dtype if jnp.issubdtype(x.dtype, jnp.floating) else q.dtype
    return x.astype(jnp.promote_types(x.dtype, weight_dtype))


def _matmul(
    x: Any,
    q: QTensor,
    site: int,
    dtype: Any,
    precision: Any,
    chosen: tuple[Choice, ...],
    turning: str | None,
    by_piece: bool,
    elements: str | None = None,
) -> Any:
    decoded = pieces.forward if by_piece else _decoded_product
    acts = q.site(site)
    x = whole = x if acts.t_in is None else turned(x, acts.t_in, turning)
    dot = partial(jnp.matmul, precision=precision, preferred_element_type=dtype)
    values_of = partial(_values, dot)
    on_kernel = [(p, c.generation) for p, c in zip(q.parts, chosen) if c.generation]
    splits = acts.activation is not None and acts.activation.outliers is not None
    terms = [
        kernel_product(x, acts, part, dtype, generation, values_of)
        for part, generation in on_kernel
        if not splits
    ]
    by_sums = [part for part, choice in zip(q.parts, chosen) if choice.sums]
    narrow = [part for part, choice in zip(q.parts, chosen) if choice.narrow]
    if acts.activation is None:
        terms += [sums_product(x, part, dtype, precision) for part in by_sums]
        terms += [narrow_product(x, part, dtype, precision) for part in narrow]
    else:
        for way, parts in (("sums", by_sums), ("narrow", narrow)):
            terms += [_coded_product(x, acts, p, dtype, dot, 1, way) for p in parts]
    first = [part for part, choice in zip(q.parts, chosen) if choice.vectors]
    terms += [vectors_product(x, part, dtype) for part in first]
    own = [bool(c.generation) or c.sums or c.narrow or c.vectors for c in chosen]
    values = [part for part, taken in zip(q.parts, own) if not taken]
    if acts.activation is not None:
        ways = [contraction(p.format, acts.activation.format) for p in values]
        coded = [p for p, way in zip(values, ways) if way != "values"]
        x, kept, acts = split_outliers(x, acts)
        if splits:
            with_kept = partial(_values_and_kept, dot)
            terms += [
                kept_product(x, kept, acts, part, dtype, generation, with_kept)
                for part, generation in on_kernel
            ]
        least = max((choice.tokens for choice in chosen), default=1)
        terms += [_coded_product(x, acts, p, dtype, dot, least, "") for p in coded]
        x = coded_values(x, acts)
        if kept is not None:
            terms += [decoded(dot, kept, part) for part in coded]
            x = x + kept
        values = [p for p, way in zip(values, ways) if way == "values"]
    terms += [decoded(dot, x, part) for part in values]
    if q.left is not None:
        narrow = partial(jnp.matmul, precision=precision)
        inner = _factor_product(narrow, whole, q.left)
        terms.append(_factor_product(dot, inner, q.right))
    if q.sparse is not None:
        terms.append(elements_product(dot, x, q, dtype, elements))
    y = reduce(add, terms)
    y = y if acts.t_out is None else acts.t_out(y)
    return y if q.bias is None else y + q.bias.astype(y.dtype)[..., None, :]


_matmul.__name__ = "qmatmul"
product_of = jax.jit(_matmul, static_argnums=(2, 3, 4, 5, 6, 7, 8))
"""What `matmul` runs; by piece, decoded weights are, and nothing is differentiated."""


def _values(dot: Any, x: Any, acts: SiteActs, part: Coded) -> Any:
    """The product of the values that codes stand for: what gradients are those of."""
    x = x if acts.activation is None else coded_values(x, acts)
    return _decoded_product(dot, x, part)


def _values_and_kept(dot: Any, x: Any, kept: Any, acts: SiteActs, part: Coded) -> Any:
    """The same where some features stay in float."""
    return _decoded_product(dot, coded_values(x, acts) + kept, part)


def _factor_product(dot: Any, x: Any, factor: Any) -> Any:
    """The product with a low-rank factor, coded or not."""
    if isinstance(factor, Coded):
        return _decoded_product(dot, x, factor)
    return dot(x, factor.astype(x.dtype))


def _decoded_product(dot: Any, x: Any, part: Coded) -> Any:
    """What `x` gives with the decoded weight.

    The backward pass decodes again: what is kept for it is the codes, never a float
    weight.
    """

    @jax.checkpoint
    def product(x: Any, part: Coded) -> Any:
        return dot(x, part.decode(x.dtype))

    return product(x, part)


@partial(jax.custom_jvp, nondiff_argnums=(3, 4, 5, 6))
def _coded_product(
    x: Any,
    acts: SiteActs,
    part: Coded,
    dtype: Any,
    dot: Any,
    tokens: int,
    way: str,
) -> Any:
    """Codes contracted with codes; the gradient is that of their values."""
    if way == "sums":
        return coded_sums_product(x, acts, part).astype(dtype)
    if way == "narrow":
        return coded_narrow_product(x, acts, part).astype(dtype)
    coded = code_input(x, acts)
    whole = isinstance(part.format, Int)
    y = _int_dot(coded, part, tokens) if whole else _float8_dot(coded, part)
    return y.astype(dtype)


@_coded_product.defjvp
def _coded_product_jvp(
    dtype: Any, dot: Any, tokens: int, way: str, primals: Any, tangents: Any
) -> Any:
    out = _coded_product(*primals, dtype, dot, tokens, way)
    return out, jax.jvp(partial(_values, dot), primals, tangents)[1]


def _groups(coded: CodedInput, part: Coded) -> int:
    """Length of the pieces of K with one scale on both sides."""
    sizes = (part.format.granularity.rows, coded.format.granularity.rows)
    return min(size or part.shape[0] for size in sizes)


def _cut(codes: Any, group: int) -> Any:
    """`[..., K, X]` as `[..., G, group, X]`, the last group filled with zeros."""
    K, X = codes.shape[-2:]
    count = -(-K // group)
    short = count * group - K
    if short:
        widths = [(0, 0)] * (codes.ndim - 2) + [(0, short), (0, 0)]
        codes = jnp.pad(codes, widths, constant_values=jnp.zeros((), codes.dtype))
    return codes.reshape(*codes.shape[:-2], count, group, X)


def _per_group(values: Any, format: Any, count: int, width: int) -> Any:
    """Scales or zeros as `[..., G, X]`, one row for every group of the contraction."""
    cols = format.granularity.cols
    if cols not in (1, None):
        values = jnp.repeat(values, cols, axis=-1)[..., :width]
    return jnp.broadcast_to(values, (*values.shape[:-2], count, width))


def _accumulate(pieces: tuple[Any, ...], one: Any) -> Any:
    """Sum `one(...)` over the group axis of every array, one group at a time."""
    count = pieces[0].shape[0]
    first = one(*(p[0] for p in pieces))
    if count == 1:
        return first

    def step(total: Any, group: tuple[Any, ...]) -> tuple[Any, None]:
        return total + one(*group), None

    return jax.lax.scan(step, first, tuple(p[1:] for p in pieces))[0]


def _int_dot(coded: CodedInput, part: Coded, tokens: int) -> Any:
    """int8 by int8 into int32 for each group; scales and zeros on the accumulator.

    `sum (u - z)(v - t) = sum u v - t sum u - z sum v + n z t`.
    """
    assert isinstance(part.format, Int) and isinstance(coded.format, Int)
    x, x_zero = integers(coded.codes, coded.grid, coded.format)
    grid = part.grid()
    group, (K, N), M = _groups(coded, part), part.shape, x.shape[-1]
    # Rows of outputs are contracted as they lie: a CPU would have to turn them.
    rows = isinstance(part, Packed) and part.order == ROWS and group == K
    w, w_zero = _stored(part, grid, rows) or integers(part.unpack(), grid, part.format)
    xs = jnp.moveaxis(_cut(x, group), -3, 0)
    count = xs.shape[0]
    lengths = jnp.minimum(group, K - group * jnp.arange(count)).astype(jnp.int32)

    def by_group(values: Any, format: Int, width: int) -> Any:
        return jnp.moveaxis(_per_group(values, format, count, width), -2, 0)

    extra = {
        "sx": by_group(coded.grid.scale.astype(jnp.float32), coded.format, M),
        "sw": by_group(grid.scale.astype(jnp.float32), part.format, N),
        "n": lengths,
    }
    if x_zero is not None:
        extra["zx"] = by_group(x_zero, coded.format, M)
    if w_zero is not None:
        extra["zw"] = by_group(w_zero, part.format, N)
    names = tuple(extra)

    def one(x: Any, w: Any, *rest: Any) -> Any:
        given = dict(zip(names, rest))
        total = _int8_product(x, w, tokens, rows)
        zx, zw = given.get("zx"), given.get("zw")
        if zw is not None and zw.dtype == jnp.float32:
            total = total.astype(jnp.float32)
            zx = None if zx is None else zx.astype(jnp.float32)
        kind = total.dtype
        if zw is not None:
            sums = jnp.sum(x, axis=-2, dtype=jnp.int32).astype(kind)
            total = total - sums[..., :, None] * zw[..., None, :]
        if zx is not None:
            sums = jnp.sum(w, axis=-1 if rows else -2, dtype=jnp.int32).astype(kind)
            total = total - zx[..., :, None] * sums[..., None, :]
        if zx is not None and zw is not None:
            total = total + given["n"].astype(kind) * (
                zx[..., :, None] * zw[..., None, :]
            )
        scale = given["sx"][..., :, None] * given["sw"][..., None, :]
        return total.astype(jnp.float32) * scale

    if rows:
        return one(xs[0], w, *(values[0] for values in extra.values()))
    ws = jnp.moveaxis(_cut(w, group), -3, 0)
    return _accumulate((xs, ws, *extra.values()), one)


def _stored(part: Coded, grid: Grid, rows: bool) -> tuple[Any, Any] | None:
    """Codes and zeros of a weight that is stored as int8: nothing passes over it."""
    assert isinstance(part.format, Int)
    if not rows and (part.format.bits < 8 or isinstance(part, Packed)):
        return None
    if part.format.symmetric:
        return part.codes, None
    dtype = jnp.float32 if part.format.zero == "float" else jnp.int32
    return part.codes, grid.zero.astype(dtype) - dtype(part.format.half)


def _int8_product(x: Any, w: Any, tokens: int, rows: bool) -> Any:
    """`x[..., K, M]`, `w[..., K, N]` (of `rows`: `[..., N, K]`) in int8 to int32.

    The number of tokens is filled up to a multiple of `tokens`.
    """
    batch, M = tuple(range(x.ndim - 2)), x.shape[-1]
    short = [(0, 0)] * len(batch) + [(0, -M % tokens), (0, 0)]
    x = jnp.pad(jnp.swapaxes(x, -1, -2), short)
    axes = (((x.ndim - 1,), (w.ndim - 1 if rows else w.ndim - 2,)), (batch, batch))
    y = jax.lax.dot_general(x, w, axes, preferred_element_type=jnp.int32)
    return y[..., :M, :]


def _float8_dot(coded: CodedInput, part: Coded) -> Any:
    """float8 by float8 into float32, scales on the accumulator of each group."""
    assert isinstance(part.format, Float) and isinstance(coded.format, Float)
    group = _groups(coded, part)
    x, w = coded.codes, part.unpack()
    M, N = x.shape[-1], w.shape[-1]
    xs, ws = (jnp.moveaxis(_cut(c, group), -3, 0) for c in (x, w))
    scales = (
        jnp.moveaxis(
            _per_group(grid.scale.astype(jnp.float32), format, xs.shape[0], width),
            -2,
            0,
        )
        for grid, format, width in (
            (coded.grid, coded.format, M),
            (part.grid(), part.format, N),
        )
    )

    def one(x: Any, w: Any, sx: Any, sw: Any) -> Any:
        batch = tuple(range(x.ndim - 2))
        axes = (((x.ndim - 2,), (w.ndim - 2,)), (batch, batch))
        y = jax.lax.dot_general(x, w, axes, preferred_element_type=jnp.float32)
        return y * (sx[..., :, None] * sw[..., None, :])

    return _accumulate((xs, ws, *scales), one)
