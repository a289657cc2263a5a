"""Integer codes as float32, differentiable in what their grid is made of.

Rounding is passed straight through; a code that is clipped has no gradient. The codes
are those that are stored, so that a weight has one value while it is learned and after.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from qjax.core.coded import Coded, pack_codes
from qjax.core.granularity import spread
from qjax.core.integer import Int
from qjax.core.rounding import clamp, divide, round_ste, straight_through
from qjax.core.scales import MINMAX, Grid, block_range, scale_type


def clipped_grid(
    w: Float[Array, "... K N"], low: Any, high: Any, format: Int
) -> tuple[Grid, Float32[Array, "..."]]:
    """The grid of ranges multiplied by `low` and `high`, and its zeros as float32.

    Args:
      w: the weights.
      low, high: factors `[..., Gk, Gn]` on the smallest and largest weight of blocks.
      format: any integer format.
    """
    bottom, top = block_range(w, format.granularity, MINMAX)
    bottom, top = bottom * low, top * high
    grid = format.grid_of(bottom, top, scale_type(format.scale_dtype, w))
    if format.symmetric:
        return grid, jnp.full_like(bottom, format.half)
    exact = -bottom / grid.scale.astype(jnp.float32)
    return grid, straight_through(exact, grid.zero.astype(jnp.float32))


def in_steps(
    w: Float[Array, "... K N"], scale: Float[Array, "..."], format: Int
) -> Float32[Array, "... K N"]:
    """`w / s`."""
    steps = spread_to(scale, format, w)
    return divide(w.astype(jnp.float32), jnp.broadcast_to(steps, w.shape))


def codes_of(
    steps: Float32[Array, "... K N"], zero: Float32[Array, "..."], format: Int
) -> Float32[Array, "... K N"]:
    """Unsigned codes of `w / s`: rounded, then moved by the zero, then clipped.

    A zero that is no code is added before rounding.
    """
    zero = spread_to(zero, format, steps)
    whole = format.zero != "float"
    codes = round_ste(steps) + zero if whole else round_ste(steps + zero)
    return within_codes(codes, format)


def within_codes(codes: Float32[Array, "..."], format: Int) -> Float32[Array, "..."]:
    """Clipped to the codes that there are."""
    lowest = np.float32(format.symmetric and format.scale_rule in ("narrow", "float16"))
    return clamp(codes, lowest, np.float32(2**format.bits - 1))


def weight_of(
    codes: Float32[Array, "... K N"],
    scale: Float[Array, "..."],
    zero: Float32[Array, "..."],
    format: Int,
) -> Float32[Array, "... K N"]:
    """`s (u - z)`."""
    return (codes - spread_to(zero, format, codes)) * spread_to(scale, format, codes)


def packed(codes: Float32[Array, "... K N"], grid: Grid, format: Int) -> Coded:
    """The codes as they are stored."""
    return pack_codes(codes.astype(jnp.uint8), grid, format, codes.shape[-2:])


def spread_to(values: Any, format: Int, w: Any) -> Float32[Array, "..."]:
    """Each block's value for each of its weights, in a shape that broadcasts."""
    values = values.astype(jnp.float32)
    return spread(values, format.granularity, *w.shape[-2:])
