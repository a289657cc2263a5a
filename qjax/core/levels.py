"""Levels: the published 4-bit tables, finding the nearest one, learning them."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32

# Quantiles of a normal distribution, QLoRA (Dettmers et al., 2023), appendix E.
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
# bitsandbytes' 4-bit float in the order of its codes: 0, 1/16, 8, 12, 4, 6, 2, 3, in
# twelfths, then the negative ones.
_TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
FP4 = tuple(
    sign * float(np.float32(level) / np.float32(12))
    for sign in (1, -1)
    for level in _TWELFTHS
)
UNROLLED = 32
LLOYD_STEPS = 20


def nearest_level(
    x: Float32[Array, "..."], midpoints: Float[Array, "*lead gaps"]
) -> Int32[Array, "..."]:
    """How many of the rising `midpoints` lie strictly below each `x`.

    A value on a midpoint goes to the lower level, as in bitsandbytes. Leading axes of
    `midpoints`, if any, are leading axes of `x`.
    """
    gaps = midpoints.shape[-1]
    lead = midpoints.ndim - 1
    ones = (1,) * (x.ndim - lead)

    def above(i):
        edge = midpoints[..., i].reshape(*midpoints.shape[:-1], *ones)
        return (x > edge).astype(jnp.int32)

    count = jnp.zeros(x.shape, jnp.int32)
    if gaps > UNROLLED:
        return jax.lax.fori_loop(0, gaps, lambda i, c: c + above(i), count)
    for i in range(gaps):
        count += above(i)
    return count


def learn_levels(x: Float32[Array, "... K N"], bits: int) -> Float32[Array, "... L"]:
    """`2^bits` levels in rising order for each matrix, by Lloyd's algorithm.

    Starts at the middles of equal shares of the sorted values; a level that no value is
    nearest to stays where it is.
    """
    flat = x.reshape(*x.shape[:-2], -1)
    ordered = jnp.sort(flat, axis=-1)
    shares = (np.arange(2**bits) + 0.5) / 2**bits
    levels = ordered[..., (shares * flat.shape[-1]).astype(np.int32)]

    def step(_, levels):
        codes = nearest_level(flat, (levels[..., :-1] + levels[..., 1:]) / 2)
        means = [
            jnp.mean(flat, axis=-1, where=codes == i) for i in range(levels.shape[-1])
        ]
        moved = jnp.stack(means, axis=-1)
        return jnp.sort(jnp.where(jnp.isnan(moved), levels, moved), axis=-1)

    return jax.lax.fori_loop(0, LLOYD_STEPS, step, levels)


def look_up(levels: Array, codes: Array) -> Array:
    """`levels[..., L]` at `codes[..., K, N]`, matrix by matrix."""
    if levels.ndim == 1:
        return levels[codes.astype(jnp.int32)]
    flat = codes.astype(jnp.int32).reshape(*codes.shape[:-2], -1)
    return jnp.take_along_axis(levels, flat, -1).reshape(codes.shape)
