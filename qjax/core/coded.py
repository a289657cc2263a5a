"""Weights as they are stored: packed codes beside what decodes them."""

from dataclasses import dataclass
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from qjax.core.double_quant import DoubleQuantized, double_quantize
from qjax.core.formats import Additive, Codebook, Format, Int
from qjax.core.packing import pack, unpack
from qjax.core.pytrees import register
from qjax.core.rounding import straight_through
from qjax.core.scales import MINMAX, Grid, Search

CHILDREN = ("codes", "scale", "zero", "codebook", "global_scale")


@dataclass(frozen=True, eq=False)
class Coded:
    """A matrix, or a stack of them, in one format. A pytree; axes may lead every child.

    Attributes:
      codes: below 8 bits, `uint32` words `[..., ceil(K*bits/32), N]` as
        `core/packing.py` makes them; 8-bit integers as `int8` `q = u - 128`, 8-bit
        floats as the float8 dtype, 8-bit indices as `uint8`, all `[..., K, N]`; of
        vectors of weights `uint8` or `uint16` `[..., K/length, N]`.
      scale: `[..., Gk, Gn]`, or `DoubleQuantized`.
      zero: float zeros `[..., Gk, Gn]`; integer zeros as `uint32` words packed along N,
        `[..., Gk, ceil(Gn*bits/32)]`, at 8 bits as `int8` `zero - 128`; else None.
      codebook: learned levels `[..., 2^bits]`, or vectors, else None.
      global_scale: `[..., 1, 1]` of NVFP4, else None.
      format: what the codes mean.
      shape: `(K, N)`.
    """

    codes: Any
    scale: Any
    zero: Any
    codebook: Any
    global_scale: Any
    format: Format
    shape: tuple[int, int]

    @property
    def lead(self) -> tuple[int, ...]:
        """Sizes of the leading axes: layers, experts."""
        return tuple(self.codes.shape[:-2])

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays kept."""
        leaves = jax.tree.leaves(self)
        return sum(prod(x.shape) * np.dtype(x.dtype).itemsize for x in leaves)

    @property
    def bits_per_weight(self) -> float:
        """Bits kept for each weight, all overhead counted."""
        return 8 * self.nbytes / prod((*self.lead, *self.shape))

    def __getitem__(self, index: Any) -> "Coded":
        """Index the leading axes.

        Raises:
          IndexError: there is no leading axis, or the index reaches beyond them.
        """
        reach = index if isinstance(index, tuple) else (index,)
        if len(reach) > len(self.lead):
            raise IndexError(
                f"index {index!r} has {len(reach)} parts; "
                f"this Coded has leading axes {self.lead}"
            )
        return jax.tree.map(lambda child: child[index], self)

    def unpack(self) -> Shaped[Array, "... K N"]:
        """A code for each weight or vector: unsigned integers, or the float8 dtype."""
        bits = self.format.bits or 8
        if bits < 8:
            return unpack(self.codes, bits, self.shape[0]).astype(jnp.uint8)
        return _unsigned(self.codes) if isinstance(self.format, Int) else self.codes

    def grid(self) -> Grid:
        """Scales and zeros, one for each block; double-quantized scales decoded."""
        scale, zero = self.scale, self.zero
        if isinstance(scale, DoubleQuantized):
            scale = scale.decode()
        if isinstance(self.format, Int) and self.format.zero == "int":
            blocks = self.format.granularity.counts(*self.shape)[1]
            zero = _unpack_zero(zero, self.format.bits, blocks)
        return Grid(scale, zero, self.codebook, self.global_scale)

    def columns(self, start: int, stop: int) -> "Coded":
        """Some of the outputs, of a format in which each has scales of its own."""
        grid = self.grid()
        own = Grid(
            grid.scale[..., start:stop] if grid.scale.shape[-1] > 1 else grid.scale,
            None if grid.zero is None else grid.zero[..., start:stop],
            grid.codebook,
            grid.global_scale,
        )
        codes = self.unpack()[..., start:stop]
        return pack_codes(codes, own, self.format, codes.shape[-2:])

    def decode(self, dtype: Any = jnp.float32) -> Float[Array, "... K N"]:
        """The weights, computed in float32 and rounded once to `dtype`."""
        return self.format.from_codes(self.unpack(), self.grid()).astype(dtype)


register(Coded, CHILDREN, ("format", "shape"))


def encode(
    w: Float[Array, "... K N"],
    format: Format,
    *,
    search: Search = MINMAX,
    rounding: str = "nearest",
    key: Any = None,
    importance: Float[Array, "... K"] | None = None,
) -> Coded:
    """Round weights to a format and pack them.

    Args:
      w: weights of any float dtype; statistics are taken in float32. A block that holds
        a NaN or an infinity decodes to NaN.
      format: the number format.
      search: how the range of each block is chosen.
      rounding: "nearest", or "stochastic" with a `key`.
      key: for stochastic rounding.
      importance: weight of the error for each input feature, for `MSE`.

    Raises:
      ValueError: the search or the rounding does not fit the format, or lacks a key.
    """
    grid = format.fit(w, search, importance)
    codes = format.to_codes(w, grid, rounding, key)
    return pack_codes(codes, grid, format, w.shape[-2:])


def pack_codes(codes: Any, grid: Grid, format: Format, shape: Any) -> Coded:
    """Store codes and a grid that a solver found.

    Args:
      codes: `[..., K, N]`, unsigned integers (any integer dtype) or float8.
      grid: as the format's `fit` makes it.
      format: what the codes mean.
      shape: `(K, N)`.

    Raises:
      ValueError: codes or scales do not have the shape that `shape` asks for.
    """
    K, N = (int(size) for size in shape)
    _check_shapes(codes, grid, format, (K, N))
    scale, zero, bits = grid.scale, grid.zero, format.bits or 8
    if isinstance(format, Int):
        codes = pack(codes, bits) if bits < 8 else _signed(codes)
        zero = _pack_zero(zero, bits) if format.zero == "int" else zero
    elif bits < 8:
        codes = pack(codes, bits)
    elif isinstance(format, Codebook):
        codes = codes.astype(jnp.uint8)
    if isinstance(format, Codebook) and format.double_quant:
        scale = double_quantize(scale, format.double_quant)
    return Coded(codes, scale, zero, grid.codebook, grid.global_scale, format, (K, N))


def fake_quantize(
    w: Float[Array, "... K N"],
    format: Format,
    *,
    search: Search = MINMAX,
    rounding: str = "nearest",
    key: Any = None,
) -> Float[Array, "... K N"]:
    """`w` as the format would store it, with the gradient of the identity."""
    held = jax.lax.stop_gradient(w)
    coded = encode(held, format, search=search, rounding=rounding, key=key)
    return straight_through(w, coded.decode(w.dtype))


def _check_shapes(codes: Any, grid: Grid, format: Format, shape: tuple) -> None:
    length = format.length if isinstance(format, Additive) else 1
    stored = (shape[0] // length, shape[1])
    if tuple(codes.shape[-2:]) != stored:
        raise ValueError(f"codes have shape {codes.shape}; they must end in {stored}")
    blocks = format.granularity.counts(*shape)
    if tuple(grid.scale.shape[-2:]) != blocks:
        raise ValueError(
            f"grid.scale has shape {grid.scale.shape}; "
            f"{format.name} on {shape} must end in {blocks}"
        )


def _signed(codes: Array) -> Array:
    return (codes.astype(jnp.int32) - 128).astype(jnp.int8)


def _unsigned(codes: Array) -> Array:
    return (codes.astype(jnp.int32) + 128).astype(jnp.uint8)


def _pack_zero(zero: Array, bits: int) -> Array:
    return pack(zero, bits, axis=-1) if bits < 8 else _signed(zero)


def _unpack_zero(zero: Array, bits: int, blocks: int) -> Array:
    if bits == 8:
        return _unsigned(zero)
    return unpack(zero, bits, blocks, axis=-1).astype(jnp.uint8)
