"""Floating-point numbers of 4, 6 and 8 bits, as bit patterns."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, UInt8

from qjax.core.rounding import Rounder, round_nearest


@dataclass(frozen=True)
class Minifloat:
    """A sign, `exponent` bits with this `bias`, and `mantissa` bits.

    Attributes:
      exponent: number of exponent bits.
      mantissa: number of mantissa bits.
      bias: of the exponent.
      largest: the largest finite value; encoding saturates there.
      dtype: name of the JAX dtype of the 8-bit ones, None for 4 and 6 bits.
      signed_zero: whether the pattern of -0 is a number (in e4m3b11fnuz it is NaN).
    """

    exponent: int
    mantissa: int
    bias: int
    largest: float
    dtype: str | None = None
    signed_zero: bool = True

    @property
    def bits(self) -> int:
        """Bits of one element."""
        return 1 + self.exponent + self.mantissa

    @property
    def top_exponent(self) -> int:
        """Exponent of the largest value, `emax` of the OCP specification."""
        return int(np.floor(np.log2(self.largest)))

    def encode(self, x: Float[Array, "..."], to_whole: Rounder) -> UInt8[Array, "..."]:
        """Bit patterns of `x` rounded by `to_whole` in units of the last place."""
        x = jnp.clip(x.astype(jnp.float32), -self.largest, self.largest)
        exponent = jnp.maximum(floor_log2(x), 1 - self.bias)
        steps = jnp.abs(to_whole(x * power_of_two(self.mantissa - exponent)))
        # A mantissa that rounds up to the next power of two carries by itself.
        steps = jnp.where(jnp.isnan(steps), 0, steps).astype(jnp.int32)
        index = steps + ((exponent - (1 - self.bias)) << self.mantissa)
        negative = jnp.signbit(x)
        if not self.signed_zero:
            negative &= index > 0
        return (index | (negative.astype(jnp.int32) << (self.bits - 1))).astype(
            jnp.uint8
        )

    def decode(self, patterns: UInt8[Array, "..."]) -> Float32[Array, "..."]:
        """The numbers that bit patterns stand for."""
        if self.dtype is not None:
            return jax.lax.bitcast_convert_type(patterns, jnp.dtype(self.dtype)).astype(
                jnp.float32
            )
        index = patterns.astype(jnp.uint32) & np.uint32(2 ** (self.bits - 1) - 1)
        raised = index + np.uint32((127 - self.bias) << self.mantissa)
        value = jax.lax.bitcast_convert_type(
            raised << np.uint32(23 - self.mantissa), jnp.float32
        )
        # With an exponent field of 0 there is no hidden bit.
        base = np.float32(2.0**-self.bias)
        value = jnp.where(index < 2**self.mantissa, 2 * (value - base), value)
        return jnp.where(patterns >> (self.bits - 1) > 0, -value, value)


E2M1 = Minifloat(2, 1, 1, 6.0)
E2M3 = Minifloat(2, 3, 1, 7.5)
E3M2 = Minifloat(3, 2, 3, 28.0)
E4M3 = Minifloat(4, 3, 7, 448.0, "float8_e4m3fn")
E5M2 = Minifloat(5, 2, 15, 57344.0, "float8_e5m2")
E4M3B11 = Minifloat(4, 3, 11, 30.0, "float8_e4m3b11fnuz", signed_zero=False)


def to_elements(x: Float[Array, "..."], element: Minifloat, to_whole: Rounder) -> Any:
    """Codes of `x`: the float8 dtype itself, or bit patterns of 4 and 6 bits.

    Values beyond the largest finite one saturate.
    """
    if element.dtype is None:
        return element.encode(x, to_whole)
    dtype = jnp.dtype(element.dtype)
    if to_whole is round_nearest:  # one instruction on most devices
        return jnp.clip(x, -element.largest, element.largest).astype(dtype)
    return jax.lax.bitcast_convert_type(element.encode(x, to_whole), dtype)


def from_elements(codes: Array, element: Minifloat) -> Float32[Array, "..."]:
    """The numbers that `to_elements`' codes stand for."""
    if element.dtype is None:
        return element.decode(codes)
    return codes.astype(jnp.float32)


def floor_log2(x: Float32[Array, "..."]) -> Array:
    """`floor(log2|x|)` of normal numbers, read from the exponent bits; int32."""
    raw = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return ((raw >> np.uint32(23)) & np.uint32(255)).astype(jnp.int32) - 127


def unit_factors(x: Float32[Array, "..."]) -> tuple[Array, Array]:
    """Powers of two that bring normal numbers `x` to magnitudes in [1, 4), and back.

    Multiplying by them loses nothing; sums of what the first scaled do not overflow.
    They are two because XLA turns `x / n / factor` into `x / (n * factor)`.
    """
    exponent = jnp.clip(floor_log2(x), -126, 126)
    return power_of_two(-exponent), power_of_two(exponent)


def power_of_two(exponent: Array) -> Float32[Array, "..."]:
    """Exactly `2.0**exponent` for int32 exponents from -126 to 127."""
    raw = (exponent.astype(jnp.int32) + 127) << 23
    return jax.lax.bitcast_convert_type(raw, jnp.float32)
