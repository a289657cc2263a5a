"""Codes that name vectors of neighbouring weights, as AQLM sums them.

Egiazarian et al., 2024, https://arxiv.org/abs/2401.06118, equation 4:
`w[d j : d (j+1), n] = s_n sum_c C_c[b_{c,j,n}]`. One part of a QTensor is one codebook;
the sum is that of its parts, so 2x8 is two parts of 8 bits and 1x16 one of 16 bits.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Shaped

from qjax.core.granularity import Granularity, channel
from qjax.core.rounding import divide
from qjax.core.scales import MINMAX, Grid, Search, check_scale_dtype, scale_type

DTYPES = {8: jnp.uint8, 16: jnp.uint16}
LLOYD_STEPS = 10
MOST = 2**24  # distances held at once


@dataclass(frozen=True)
class Additive:
    """A codebook of vectors times a scale for each output.

    Codes are `[..., K / length, N]`, one for `length` inputs of one output; the
    codebook `[..., 2^bits, length]` is learned for each matrix by Lloyd's algorithm.
    The scale of an output is the root mean square of its weights.

    Args:
      bits: of one code: 8 or 16.
      length: inputs that one code stands for; AQLM's default is 8.
      scale_dtype: dtype of the scales; None is that of the weights.

    Raises:
      ValueError: a field has an illegal value.
    """

    bits: int = 8
    length: int = 8
    scale_dtype: str | None = None

    def __post_init__(self):
        if self.bits not in DTYPES:
            raise ValueError(
                f"Additive.bits is {self.bits!r}; it must be one of {tuple(DTYPES)}"
            )
        if not isinstance(self.length, int) or self.length < 1:
            raise ValueError(
                f"Additive.length is {self.length!r}; "
                "it must be a positive whole number of inputs"
            )
        check_scale_dtype("Additive", self.scale_dtype)

    @property
    def granularity(self) -> Granularity:
        """A scale for each output."""
        return channel()

    @property
    def name(self) -> str:
        """A short name: `vectors 8 bits x8`."""
        return f"vectors {self.bits} bits x{self.length}"

    def fit(self, w: Any, search: Search = MINMAX, importance: Any = None) -> Grid:
        """Scales `[..., 1, N]` and the codebook `[..., 2^bits, length]`.

        Raises:
          ValueError: a search or importance is given, or K has no whole vectors.
        """
        if search != MINMAX or importance is not None:
            raise ValueError(
                f"search is {search} and importance is {type(importance).__name__}; "
                "Additive has no range to search: leave them at MinMax() and None"
            )
        wide = w.astype(jnp.float32)
        scale = jnp.sqrt(jnp.mean(wide * wide, axis=-2, keepdims=True))
        scale = scale.astype(scale_type(self.scale_dtype, w))
        learn = self._learn
        for _ in range(w.ndim - 2):
            learn = jax.vmap(learn)
        return Grid(scale, codebook=learn(self._units(w, scale)))

    def to_codes(
        self, w: Any, grid: Grid, rounding: str = "nearest", key: Any = None
    ) -> Shaped[Array, "... J N"]:
        """The nearest vectors, `[..., K / length, N]`.

        Raises:
          ValueError: another rounding than "nearest", or K has no whole vectors.
        """
        if rounding != "nearest":
            raise ValueError(
                f'rounding is {rounding!r}; vectors are rounded to the "nearest" only'
            )
        find = nearest
        for _ in range(w.ndim - 2):
            find = jax.vmap(find)
        codes = find(self._units(w, grid.scale), grid.codebook)
        return codes.astype(DTYPES[self.bits]).reshape(*w.shape[:-2], -1, w.shape[-1])

    def from_codes(self, codes: Array, grid: Grid) -> Float32[Array, "... K N"]:
        """The weights that codes stand for, float32."""
        *lead, count, N = codes.shape

        def decoded(codes: Any, book: Any) -> Any:
            return book.astype(jnp.float32)[codes.astype(jnp.int32)]

        for _ in lead:
            decoded = jax.vmap(decoded)
        vectors = jnp.swapaxes(decoded(codes, grid.codebook), -1, -2)
        w = vectors.reshape(*lead, count * self.length, N)
        return w * grid.scale.astype(jnp.float32)

    def _units(self, w: Any, scale: Any) -> Float32[Array, "... V d"]:
        """Vectors of `w` over its scale, those of one output apart by N."""
        *lead, K, N = w.shape
        if K % self.length:
            raise ValueError(
                f"there are {K} inputs; Additive.length {self.length} must divide them"
            )
        scale = scale.astype(jnp.float32)
        scale = jnp.broadcast_to(jnp.where(scale == 0, 1, scale), w.shape)
        units = divide(w.astype(jnp.float32), scale)
        units = units.reshape(*lead, K // self.length, self.length, N)
        return jnp.swapaxes(units, -1, -2).reshape(*lead, -1, self.length)

    def _learn(self, units: Any) -> Float32[Array, "L d"]:
        """Lloyd's algorithm, started from vectors spread evenly over the matrix."""
        count = 2**self.bits
        at = (jnp.arange(count) * (len(units) / count)).astype(jnp.int32)

        def step(_: Any, book: Any) -> Any:
            codes = nearest(units, book)
            total = jnp.zeros_like(book).at[codes].add(units)
            members = jnp.zeros(count).at[codes].add(1)[:, None]
            return jnp.where(members > 0, total / jnp.maximum(members, 1), book)

        return jax.lax.fori_loop(0, LLOYD_STEPS, step, units[at])


def nearest(units: Float32[Array, "V d"], book: Any) -> Any:
    """Index of the nearest vector of the codebook for each of `units`."""
    book = book.astype(jnp.float32)
    squares = jnp.sum(book * book, axis=1) / 2

    def one(unit: Any) -> Any:
        return jnp.argmin(squares - jnp.dot(book, unit, precision="highest"))

    batch = min(max(MOST // len(book), 1), len(units))
    return jax.lax.map(one, units, batch_size=batch).astype(jnp.int32)
