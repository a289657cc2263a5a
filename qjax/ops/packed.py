"""Weights in the order in which one kind of hardware reads them: packed once, at load.

A packed leaf is a QTensor with other words in it; everything that took the leaf still
does. What the hardware does not want otherwise than it is stored stays as it is.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

from qjax.core.coded import CHILDREN, Coded, pack_codes
from qjax.core.formats import Int
from qjax.core.pytrees import register
from qjax.core.qtensor import QTensor, Stacked, is_quantized
from qjax.core.scales import Grid
from qjax.ops.activations import contraction
from qjax.ops.targets import Target, here
from qjax.ops.tiles import tiled, untiled
from qjax_kernels.int_matmul import launch
from qjax_kernels.int_matmul.fragments import (
    BITS,
    TiledWeight,
    pack_tiles,
    unpack_tiles,
)

TILES, ROWS, NARROW = "tiles", "rows", "narrow"


@dataclass(frozen=True, eq=False)
class Packed(Coded):
    """A `Coded` of integers whose codes and zeros are as hardware reads them.

    Attributes:
      order: "tiles" for Hopper (`qjax_kernels/int_matmul/fragments.py`), with whole
        zeros of `q` as `int8[..., G, N]`; "rows" for CPUs and, of 8 bits, GPUs, `q` as
        `int8[..., N, K]`; or "narrow" for other GPUs, `q` as `int4[..., N, K]`. These
        keep zeros as they are.
    """

    order: str

    @property
    def lead(self) -> tuple[int, ...]:
        """Sizes of the leading axes: layers, experts."""
        return tuple(self.codes.shape[: -4 if self.order == TILES else -2])

    def unpack(self) -> Shaped[Array, "... K N"]:
        """One unsigned code for each weight."""
        half = _int(self).half
        if self.order in (ROWS, NARROW):
            q = jnp.swapaxes(self.codes, -1, -2)
        elif _int(self).bits < 8:
            return unpack_tiles(self.codes, _int(self).bits, *self.shape)
        else:
            q = unpack_tiles(self.codes, 8, *self.shape)
        return (q.astype(jnp.int16) + half).astype(jnp.uint8)

    def grid(self) -> Grid:
        """Scales and zeros of the unsigned codes."""
        if self.order != TILES or _int(self).zero != "int":
            return super().grid()
        zero = self.zero.astype(jnp.int16) + _int(self).half
        return Grid(self.scale, zero.astype(jnp.uint8))

    def tiles(self) -> TiledWeight:
        """What the kernel for Hopper takes."""
        format, zero = _int(self), self.zero
        if format.zero == "float":
            zero = zero.astype(jnp.float32) - format.half
        rows, K = format.granularity.rows, self.shape[0]
        return TiledWeight(self.codes, self.scale, zero, format.bits, rows, K)


register(Packed, CHILDREN, ("format", "shape", "order"))


def pack(qparams: Any, target: Target | None = None) -> Any:
    """The tree, its quantized leaves in the order that the target's hardware reads.

    For a Hopper GPU, integers of 2, 3, 4 and 8 bits that meet float activations: its
    kernel takes them only if they are packed. For other GPUs, 4-bit integers that meet
    float activations, and for any GPU groups of them that meet coded tokens. For a CPU,
    integers of whole channels that meet integers, and for any GPU those of 8 bits. But
    for Hopper's kernel all of these lie along K: so their products read them, and a
    loop over layers would first turn all weights. For a TPU, outlier weights in
    bfloat16 are sorted into tiles, on the host. Anything else is returned as it is. Do
    this once, after loading; packed leaves are neither saved nor sharded. `unpack`
    gives back what was packed, bit for bit.

    Args:
      qparams: arrays and QTensors.
      target: hardware, such as `qjax.Target("gpu", "hopper")`; default that of this
        process.
    """
    target = here() if target is None else target
    if target.platform == "tpu":
        return _mapped(tiled, qparams)
    return _mapped(lambda q: packed(q, order_for(q, target)), qparams)


def unpack(qparams: Any) -> Any:
    """The tree as it was before `pack`."""

    def canonical(q: QTensor) -> QTensor:
        parts = tuple(_unpacked(part) for part in q.parts)
        return replace(untiled(q), parts=parts)

    return _mapped(canonical, qparams)


def _mapped(one: Any, qparams: Any) -> Any:
    def leaf(x: Any) -> Any:
        if isinstance(x, Stacked):
            return replace(x, parts=tuple(one(part) for part in x.parts))
        return one(x) if is_quantized(x) else x

    return jax.tree.map(leaf, qparams, is_leaf=is_quantized)


def order_for(q: QTensor, target: Target) -> str:
    """How the target wants a leaf; empty for as it is."""
    activations = [acts.activation for acts in q.acts]
    if target.platform == "gpu" and not any(activations):
        return TILES if target.generation == "hopper" else NARROW
    if target.platform == "tpu" or not activations or not all(activations):
        return ""
    if target.platform == "gpu" and not all(_has_bits(p, 8) for p in q.parts):
        groups = [p.format.granularity.rows for p in q.parts if _has_bits(p, 4)]
        return NARROW if all(groups) and all(map(narrow_tokens, activations)) else ""
    pairs = [(p.format, a.format) for p in q.parts for a in activations if a]
    whole = all(f.granularity.rows is None for pair in pairs for f in pair)
    return ROWS if whole and {contraction(*pair) for pair in pairs} == {"int"} else ""


def narrow_tokens(activation: Any) -> bool:
    """Whether tokens are integers that bfloat16 holds, one scale each and no zero."""
    format = activation.format
    whole = isinstance(format, Int) and bool(format.symmetric) and format.bits <= 8
    return whole and format.granularity.rows is None and activation.outliers is None


def _has_bits(part: Coded, bits: int) -> bool:
    return isinstance(part.format, Int) and part.format.bits == bits


def packed(q: QTensor, order: str) -> QTensor:
    """The leaf in an order, where its formats have one."""
    if not order:
        return q
    parts = (
        part if unfit(part, order) or isinstance(part, Packed) else _packed(part, order)
        for part in q.parts
    )
    return replace(q, parts=tuple(parts))


@partial(jax.jit, static_argnums=1)
def _packed(part: Coded, order: str) -> Packed:
    """One program for all parts of a format and a shape."""
    format, scale, zero = _int(part), part.scale, part.zero
    codes = part.codes if format.bits == 8 else part.unpack()
    if order == TILES:
        codes = pack_tiles(codes, format.bits)
        zero = whole_zeros(part) if format.zero == "int" else zero
    else:
        q = codes if format.bits == 8 else codes.astype(jnp.int8) - format.half
        q = q if order == ROWS else q.astype(jnp.int4)
        codes = jnp.swapaxes(q, -1, -2)
    return Packed(codes, scale, zero, None, None, format, part.shape, order)


def unfit(part: Coded, order: str) -> str:
    """Why a part cannot be packed; empty if it can."""
    format = part.format
    if not isinstance(format, Int):
        return f"no kernel for {format.name}"
    if order == ROWS:
        return ""
    if format.bits not in (BITS if order == TILES else (4,)):
        return f"no kernel for {format.name}"
    if format.granularity.cols != 1:
        return f"a kernel has scales for single outputs, not {format.granularity.label}"
    return launch.unfit(format.granularity.rows) if order == TILES else ""


def unpacked(part: Coded) -> Coded:
    """The part as it was before packing, bit for bit."""
    if not isinstance(part, Packed):
        return part
    return pack_codes(part.unpack(), part.grid(), part.format, part.shape)


_unpacked = jax.jit(unpacked)


def whole_zeros(part: Coded) -> jax.Array:
    """Whole zero points of the signed codes."""
    zero = part.grid().zero.astype(jnp.int16)
    return (zero - _int(part).half).astype(jnp.int8)


def _int(part: Coded) -> Int:
    assert isinstance(part.format, Int)
    return part.format
