"""Whether records of a stored tree are what their classes say: types, then shapes.

Values that fit each other may still be forged; what does not fit would give wrong
weights, or fail far from here.
"""

from collections.abc import Callable, Mapping
from functools import cache
from math import prod
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import jax.numpy as jnp
import numpy as np

from qjax.core.coded import Coded
from qjax.core.double_quant import DoubleQuantized
from qjax.core.floats import MX, Float
from qjax.core.formats import NVFP4, Additive, Codebook, Int
from qjax.core.packing import words_for
from qjax.core.qtensor import QTensor, SiteActs, Sparse, Stacked
from qjax.core.transforms import (
    TRANSFORMS,
    Chain,
    Dense,
    Diagonal,
    Hadamard,
    Kronecker,
    Permutation,
)

Shape = tuple[int, ...]


def check_types(kind: type, values: Mapping[str, Any]) -> None:
    """Refuse fields of other types than the class's annotations; `Any` takes all.

    Raises:
      ValueError: naming the class, the field and the value.
    """
    hints = _hints(kind)
    for name, value in values.items():
        if not _fits(value, hints[name]):
            raise ValueError(
                f"the tree holds a {kind.__name__} whose {name} is {_shown(value)}"
            )


def check_shapes(record: Any) -> None:
    """Refuse a record whose arrays do not have the shapes that the others ask for.

    Raises:
      ValueError: naming the class, the field, what it is and what it must be.
    """
    check = _CHECKS.get(type(record))
    if check is not None:
        check(record)


_hints = cache(get_type_hints)


def _fits(value: Any, hint: Any) -> bool:
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, UnionType):
        return any(_fits(value, each) for each in inner)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if inner[-1] is Ellipsis:
            return all(_fits(each, inner[0]) for each in value)
        return len(value) == len(inner) and all(map(_fits, value, inner))
    if hint is int and isinstance(value, bool):
        return False
    return isinstance(value, NoneType if hint is None else origin or hint)


def _shown(value: Any) -> str:
    if _is_array(value):
        return f"an array {np.dtype(value.dtype).name}{list(value.shape)}"
    text = repr(value)
    return text if len(text) < 80 else f"a {type(value).__name__}"


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")


def _wrong(record: Any, name: str, expected: str) -> ValueError:
    found = _shown(getattr(record, name))
    return ValueError(
        f"the tree holds a {type(record).__name__} whose {name} is {found}, expected "
        f"{expected}"
    )


def _expect(record: Any, name: str, tail: Shape, *dtypes: Any) -> None:
    """An array that ends in these axes, of one of these dtypes if any are given."""
    value = getattr(record, name)
    fits = _is_array(value) and tuple(value.shape[-len(tail) :]) == tail
    if not fits or (dtypes and jnp.dtype(value.dtype) not in map(jnp.dtype, dtypes)):
        kinds = " or ".join(jnp.dtype(each).name for each in dtypes)
        raise _wrong(record, name, f"an array {kinds}[..., {str(list(tail))[1:]}")


def _absent(record: Any, *names: str) -> None:
    for name in names:
        if getattr(record, name) is not None:
            raise _wrong(record, name, "none")


def _coded(part: Coded) -> None:
    (K, N), format = part.shape, part.format
    if K < 1 or N < 1:
        raise _wrong(part, "shape", "two positive sizes")
    _expect(part, "codes", *_codes(format, K, N))
    blocks = format.granularity.counts(K, N)
    if isinstance(part.scale, DoubleQuantized):
        if tuple(part.scale.codes.shape[-2:]) != blocks:
            raise _wrong(part.scale, "codes", f"an array [..., {blocks}]")
    else:
        _expect(part, "scale", blocks)
    _zero(part, blocks)
    if isinstance(format, Additive):
        _expect(part, "codebook", (2**format.bits, format.length))
    elif isinstance(format, Codebook) and format.levels is None:
        assert format.bits is not None
        _expect(part, "codebook", (2**format.bits,))
    else:
        _absent(part, "codebook")
    if isinstance(format, NVFP4):
        _expect(part, "global_scale", (1, 1))
    else:
        _absent(part, "global_scale")
    for name in ("scale", "zero", "codebook", "global_scale"):
        if not _leads(getattr(part, name), part.lead):
            raise _wrong(part, name, f"the leading axes {list(part.lead)} of the codes")


def _leads(value: Any, lead: Shape) -> bool:
    return not _is_array(value) or tuple(value.shape[: len(lead)]) == lead


def _codes(format: Any, K: int, N: int) -> tuple[Any, ...]:
    """How codes of `[K, N]` end, and their dtypes."""
    bits = format.bits or 8
    if isinstance(format, Additive):
        return (K // format.length, N), jnp.uint8, jnp.uint16
    if bits < 8:
        return (words_for(K, bits), N), jnp.uint32
    if isinstance(format, Int):
        return (K, N), jnp.int8
    if isinstance(format, Codebook):
        return (K, N), jnp.uint8
    assert isinstance(format, Float | MX)
    element = format.element if isinstance(format, Float) else format.minifloat
    return (K, N), element.dtype


def _zero(part: Coded, blocks: tuple[int, int]) -> None:
    format = part.format
    kind = format.zero if isinstance(format, Int) else "none"
    if kind == "none":
        _absent(part, "zero")
    elif kind == "float":
        _expect(part, "zero", blocks)
    elif format.bits == 8:
        _expect(part, "zero", blocks, jnp.int8)
    else:
        assert format.bits is not None
        packed = (blocks[0], words_for(blocks[1], format.bits))
        _expect(part, "zero", packed, jnp.uint32)


def _double_quantized(scale: DoubleQuantized) -> None:
    for name in ("codes", "absmax", "offset"):
        if not _is_array(getattr(scale, name)):
            raise _wrong(scale, name, "an array")
    if scale.codes.ndim < 2:
        raise _wrong(scale, "codes", "a matrix")
    if scale.block < 1:
        raise _wrong(scale, "block", "a positive whole number")
    blocks = -(-prod(scale.codes.shape[-2:]) // scale.block)
    _expect(scale, "absmax", (blocks,))
    if tuple(scale.offset.shape) != tuple(scale.codes.shape[:-2]):
        raise _wrong(scale, "offset", "a number of each matrix")


def _sparse(sparse: Sparse) -> None:
    if not _is_array(sparse.values) or sparse.values.ndim < 1:
        raise _wrong(sparse, "values", "an array [..., n]")
    for name in ("rows", "cols"):
        _expect(sparse, name, tuple(sparse.values.shape))
        if not jnp.issubdtype(getattr(sparse, name).dtype, jnp.integer):
            raise _wrong(sparse, name, "whole numbers")


def _site_acts(acts: SiteActs) -> None:
    for name in ("scale", "zero", "global_scale"):
        value = getattr(acts, name)
        if value is not None and not _is_array(value):
            raise _wrong(acts, name, "an array or none")
    for name in ("t_in", "t_out"):
        if not isinstance(getattr(acts, name), (NoneType, *TRANSFORMS)):
            raise _wrong(acts, name, "a transform or none")
    static = acts.activation is not None and not acts.activation.dynamic
    if static and acts.scale is None and acts.global_scale is None:
        raise _wrong(acts, "scale", "a static range, as its activation says")


def _vector(name: str) -> Callable[[Any], None]:
    """A transform of one array with an axis at least."""

    def check(transform: Any) -> None:
        value = getattr(transform, name)
        if not _is_array(value) or value.ndim < 1:
            raise _wrong(transform, name, "an array")

    return check


def _square(*names: str) -> Callable[[Any], None]:
    """A transform of square matrices."""

    def check(transform: Any) -> None:
        for name in names:
            value = getattr(transform, name)
            if not _is_array(value) or value.ndim < 2:
                raise _wrong(transform, name, "a square matrix")
            _expect(transform, name, (value.shape[-1],) * 2)

    return check


def _chain(chain: Chain) -> None:
    if not all(isinstance(each, TRANSFORMS) for each in chain.transforms):
        raise _wrong(chain, "transforms", "transforms")


def _size(transform: Any) -> set[int]:
    """The sizes of the matrices that a transform stands for: one, if it is sound."""
    if isinstance(transform, Chain):
        return set().union(*map(_size, transform.transforms))
    if isinstance(transform, Kronecker):
        return {transform.a.shape[-1] * transform.b.shape[-1]}
    arrays = {Diagonal: "scale", Permutation: "index", Hadamard: "signs"}
    return {getattr(transform, arrays.get(type(transform), "matrix")).shape[-1]}


def _qtensor(q: QTensor) -> None:
    K, N = q.layout.K, q.layout.N
    for part in q.parts:
        if part.shape != (K, N):
            raise _wrong(part, "shape", f"{(K, N)}, which its layout {q.layout} says")
    if not isinstance(q.dtype, np.dtype) or not jnp.issubdtype(q.dtype, jnp.floating):
        raise _wrong(q, "dtype", "a float dtype")
    if not q.parts and q.left is None:
        raise _wrong(q, "parts", "one at least")
    _low_rank(q, K, N)
    if not isinstance(q.sparse, (NoneType, Sparse)):
        raise _wrong(q, "sparse", "outliers or none")
    if q.bias is not None:
        _expect(q, "bias", (N,))
    for acts in q.acts:
        for name, size in (("t_in", K), ("t_out", N)):
            transform = getattr(acts, name)
            if transform is not None and _size(transform) != {size}:
                raise _wrong(acts, name, f"a transform of {size} features")


def _low_rank(q: QTensor, K: int, N: int) -> None:
    if (q.left is None) != (q.right is None):
        raise _wrong(q, "left", "a factor exactly where right is one")
    if q.left is None:
        return
    for name in ("left", "right"):
        value = getattr(q, name)
        if not isinstance(value, Coded) and not (_is_array(value) and value.ndim >= 2):
            raise _wrong(q, name, "a matrix")
    (rows, rank), (same, cols) = q.left.shape[-2:], q.right.shape[-2:]
    if (rows, cols) != (K, N) or rank != same:
        raise _wrong(q, "left", f"a matrix of {K} rows, of as many columns as right")


def _stacked(stacked: Stacked) -> None:
    starts = [0, *(stop for _, stop in stacked.ranges)]
    counts = [stop - start for start, stop in stacked.ranges]
    runs = [part.lead[:1] for part in stacked.parts]
    joined = starts[:-1] == [start for start, _ in stacked.ranges]
    if not counts or not joined or runs != [(count,) for count in counts]:
        raise _wrong(stacked, "ranges", "runs of the layers that its parts hold")


_CHECKS: dict[type, Callable[[Any], None]] = {
    Coded: _coded,
    DoubleQuantized: _double_quantized,
    Sparse: _sparse,
    SiteActs: _site_acts,
    Diagonal: _vector("scale"),
    Permutation: _vector("index"),
    Hadamard: _vector("signs"),
    Kronecker: _square("a", "b"),
    Dense: _square("matrix"),
    Chain: _chain,
    QTensor: _qtensor,
    Stacked: _stacked,
}
