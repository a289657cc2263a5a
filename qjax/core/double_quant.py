"""QLoRA's double quantization: scales coded with 8 bits in blocks of 256.

The 8-bit map is the dynamic one of "8-Bit Approximations for Parallelism in Deep
Learning" (Dettmers, 2015): a sign, a run of zeros that gives the power of ten, and the
bits that are left divide [0.1, 1] evenly. As in bitsandbytes on a CPU, a scale is first
brought to one of 65536 even points, then to the level nearest to that point.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from qjax.core.levels import nearest_level
from qjax.core.minifloat import unit_factors
from qjax.core.pytrees import register
from qjax.core.rounding import times_reciprocal

POINTS = 65536


@dataclass(frozen=True, eq=False)
class DoubleQuantized:
    """Scales `[..., Gk, Gn]` as 8-bit codes, one absmax per block, and an offset.

    Blocks run over the scales in the order `[Gn, Gk]`, that of bitsandbytes, which
    flattens the weight as `[out, in]`.

    Attributes:
      codes: `[..., Gk, Gn]` uint8, indices into the dynamic map.
      absmax: `[..., ceil(Gk*Gn / block)]` float32.
      offset: `[...]` float32, the mean of the scales of each matrix.
      block: scales per block.
    """

    codes: Any
    absmax: Any
    offset: Any
    block: int

    def decode(self) -> Float32[Array, "... Gk Gn"]:
        """The scales, float32."""
        Gk, Gn = self.codes.shape[-2:]
        unit = jnp.asarray(dynamic_map())[self.codes.astype(jnp.int32)]
        flat = unit.swapaxes(-1, -2).reshape(*unit.shape[:-2], Gk * Gn)
        absmax = jnp.repeat(self.absmax, self.block, axis=-1)[..., : Gk * Gn]
        scales = flat * absmax + self.offset[..., None]
        return scales.reshape(*unit.shape[:-2], Gn, Gk).swapaxes(-1, -2)


register(DoubleQuantized, ("codes", "absmax", "offset"), ("block",))


def double_quantize(scale: Float[Array, "... Gk Gn"], block: int) -> DoubleQuantized:
    """Code scales with 8 bits, in blocks of `block`."""
    Gk, Gn = scale.shape[-2:]
    lead = scale.shape[:-2]
    flat = scale.astype(jnp.float32).swapaxes(-1, -2).reshape(*lead, Gk * Gn)
    factor, back = unit_factors(jnp.abs(flat).max(-1))
    offset = (flat * factor[..., None]).mean(-1) * back
    centred = flat - offset[..., None]
    missing = -centred.shape[-1] % block
    padded = jnp.pad(centred, [(0, 0)] * len(lead) + [(0, missing)])
    blocks = padded.reshape(*lead, -1, block)
    absmax = jnp.abs(blocks).max(-1)
    unit = times_reciprocal(blocks, jnp.where(absmax == 0, 1, absmax)[..., None])
    codes = nearest_level(_point(unit), jnp.asarray(_edges()))
    codes = jnp.where(absmax[..., None] == 0, 0, codes)
    codes = codes.astype(jnp.uint8).reshape(*lead, -1)[..., : Gk * Gn]
    return DoubleQuantized(
        codes.reshape(*lead, Gn, Gk).swapaxes(-1, -2), absmax, offset, block
    )


def _point(unit: Array) -> Array:
    """Which of `POINTS` evenly spaced points of [-1, 1] is nearest, as float32."""
    half = (jnp.clip(unit, -1, 1) + 1) * np.float32(0.5)
    return jnp.floor(half * np.float32(POINTS - 1) + np.float32(0.5))


@cache
def _edges() -> np.ndarray:
    """Between which points the nearest level of the dynamic map changes, `[255]`."""
    levels = dynamic_map()
    midpoints = np.float32(0.5) * (levels[:-1] + levels[1:])
    steps = np.float32(2) * np.arange(POINTS, dtype=np.float32)
    points = np.float32(-1) + steps / np.float32(POINTS - 1)
    return np.searchsorted(points, midpoints, side="right").astype(np.float32) - 0.5


@cache
def dynamic_map() -> np.ndarray:
    """The 256 values of the signed dynamic map in rising order, float32."""
    magnitudes = []
    for zeros in range(7):
        edges = _even(2 ** (6 - zeros) + 1)
        magnitudes.append(np.float32(10.0**-zeros) * ((edges[:-1] + edges[1:]) / 2))
    positive = np.concatenate(magnitudes)
    extremes = np.asarray([0, 1], np.float32)
    return np.sort(np.concatenate([-positive, positive, extremes]))


def _even(count: int) -> np.ndarray:
    """`count` even steps from 0.1 to 1, rounded in float32 from both ends.

    The last bit of the published map comes from this order of rounding.
    """
    first, last = np.float32(0.1), np.float32(1)
    step = np.float64((last - first) / np.float32(count - 1))
    i = np.arange(count)
    rising, falling = first + step * i, last - step * (count - 1 - i)
    return np.where(i < count // 2, rising, falling).astype(np.float32)
