"""A coded weight decoded a few columns at a time: in neither pass a float one of it.

    y[:, n] = x W[:, n],      dx = sum_n dy[:, n] W[:, n]^T

with `n` one piece of the columns after the other, the last one narrower where their
width does not divide N.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import ceil, lcm, prod
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qjax.core.coded import Coded
from qjax.ops.packed import NARROW, ROWS, TILES, Packed
from qjax_kernels.int_matmul.fragments import OUTPUTS

PIECES = 8
LANES = 128  # of a TPU's registers: pieces of whole ones where there are several

Dot = Callable[[Any, Any], Any]
"""`dot(x[..., M, K], w[..., K, n])`, or of experts."""


@dataclass(frozen=True)
class Cut:
    """How N columns are cut: `count` pieces of `width`, and one of `rest`."""

    width: int
    count: int
    rest: int


def cut_of(N: int, pieces: int = PIECES, unit: int = 1) -> Cut:
    """At most so many pieces, of whole units; of whole lanes where there are several.

    >>> cut_of(344, 8, 1)
    Cut(width=128, count=2, rest=88)
    """
    unit = lcm(unit, LANES) if N >= 2 * LANES else unit
    width = min(ceil(ceil(N / pieces) / unit) * unit, N)
    return Cut(width, N // width, N % width)


def cut_parts(*parts: Coded) -> Cut:
    """How parts of one weight are cut: of experts no piece is larger than one is."""
    unit = lcm(*(part.format.granularity.cols or 1 for part in parts))
    if any(isinstance(part, Packed) and part.order == TILES for part in parts):
        unit = lcm(unit, OUTPUTS)
    return cut_of(parts[0].shape[1], max(PIECES, prod(parts[0].lead)), unit)


def decoder(part: Coded, dtype: Any) -> Callable[[Any, int], Float[Array, "... K n"]]:
    """`decoded(start, width)`: these columns as floats; `start` may be traced."""
    grid, cols = part.grid(), part.format.granularity.cols
    order = part.order if isinstance(part, Packed) else ""
    places = {TILES: (-4, OUTPUTS), ROWS: (-2, 1), NARROW: (-2, 1)}
    where = places.get(order, (-1, 1))

    def decoded(start: Any, width: int) -> Any:
        def of_columns(x: Any) -> Any:
            if x is None or cols is None:
                return x
            return columns(x, start, width, -1, cols)

        codes = columns(part.codes, start, width, *where)
        piece = replace(part, codes=codes, shape=(part.shape[0], width))
        own = replace(grid, scale=of_columns(grid.scale), zero=of_columns(grid.zero))
        return part.format.from_codes(piece.unpack(), own).astype(dtype)

    return decoded


def columns(x: Any, start: Any, width: int, axis: int = -1, unit: int = 1) -> Any:
    """The columns from `start` on, which lie `unit` by `unit` along an axis."""
    size = ceil(width / unit)
    return jax.lax.dynamic_slice_in_dim(x, start // unit, size, axis % x.ndim)


def by_columns(one: Callable[[Any, int], Any], cut: Cut) -> Any:
    """`one(start, width)`, columns in its last axis, of all pieces side by side."""
    if cut.count == 1 and not cut.rest:
        return one(0, cut.width)
    y = jax.lax.map(lambda i: one(i * cut.width, cut.width), jnp.arange(cut.count))
    y = jnp.moveaxis(y, 0, -2)
    y = y.reshape(*y.shape[:-2], cut.count * cut.width)
    if not cut.rest:
        return y
    return jnp.concatenate([y, one(cut.count * cut.width, cut.rest)], axis=-1)


def forward(dot: Dot, x: Any, part: Coded) -> Any:
    """What `x` gives with the part."""
    decoded = decoder(part, x.dtype)
    return by_columns(
        lambda start, width: dot(x, decoded(start, width)), cut_parts(part)
    )


def backward(dot: Dot, dy: Any, part: Coded, dtype: Any) -> Any:
    """What `dy` gives with the part's transpose, which is decoded in `dtype`."""
    decoded, cut = decoder(part, dtype), cut_parts(part)

    def one(start: Any, width: int) -> Any:
        w = jnp.swapaxes(decoded(start, width), -1, -2)
        return dot(columns(dy, start, width).astype(dtype), w)

    first = one(cut.count * cut.width, cut.rest) if cut.rest else one(0, cut.width)
    skipped = 0 if cut.rest else 1

    def add(total: Any, i: Any) -> tuple[Any, None]:
        return total + one(i * cut.width, cut.width), None

    return jax.lax.scan(add, first, jnp.arange(skipped, cut.count))[0]
