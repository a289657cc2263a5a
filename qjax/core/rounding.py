"""From real numbers to whole ones: nearest, stochastic, straight-through."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

Rounder = Callable[[Array], Array]
_LARGE = np.float32(2.0**100)


def round_nearest(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Round to the nearest whole number, halves to the even one."""
    return jnp.round(x)


def round_stochastic(x: Float[Array, "..."], key: Any) -> Float[Array, "..."]:
    """Round down or up at random, so that the mean over keys is `x`."""
    return jnp.floor(x + jax.random.uniform(key, x.shape, x.dtype))


def round_ste(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`round_nearest` with the gradient of the identity (straight-through)."""
    return straight_through(x, jnp.round(x))


def clamp(x: Any, low: Any, high: Any) -> Any:
    """`x` within `[low, high]`; at the ends the gradient is that of `x`."""
    return jnp.where(x < low, low, jnp.where(x > high, high, x))


@jax.custom_jvp
def straight_through(x: Float[Array, "..."], value: Float[Array, "..."]) -> Array:
    """`value`, with the gradient of the identity with respect to `x`."""
    return value.astype(x.dtype)


@straight_through.defjvp
def _straight_through_jvp(primals: tuple, tangents: tuple) -> tuple:
    return straight_through(*primals), tangents[0]


def rounder(rounding: str, key: Any = None) -> Rounder:
    """The rounding function of this name, "nearest" or "stochastic".

    Raises:
      ValueError: the name is unknown, or "stochastic" came without a key.
    """
    if rounding == "nearest":
        return round_nearest
    if rounding != "stochastic":
        raise ValueError(
            f'rounding is {rounding!r}; it must be "nearest" or "stochastic"'
        )
    if key is None:
        raise ValueError('rounding="stochastic" needs a key, such as jax.random.key(0)')
    return lambda x: round_stochastic(x, key)


def divide(x: Float[Array, "..."], y: Any) -> Float[Array, "..."]:
    """`x / y`, correctly rounded also where XLA would multiply by a reciprocal.

    XLA turns a division by a broadcast operand into `x * (1 / y)`, which is off by one
    unit in the last place for most operands and moves a weight that lies on a tie (the
    largest weight of a group always does) to another code. A divisor that depends on
    `x` is not a broadcast; replacing `y` where `x` is NaN changes no result.
    """
    return x / jnp.where(jnp.isnan(x), x, jnp.asarray(y, x.dtype))


def times_reciprocal(x: Any, y: Float32[Array, "..."]) -> Float32[Array, "..."]:
    """`x * (1 / y)`, as libraries that keep reciprocals round it.

    The reciprocal of a `y` above 2^126 is subnormal, and devices flush it to zero; so
    where `y` is large a quarter of each operand takes part, which changes no bit.
    """
    part = jnp.where(jnp.abs(y) > _LARGE, np.float32(0.25), np.float32(1))
    return (x * part) * (1 / (y * part))
