"""Coded floats in VMEM to numbers that the matrix unit takes.

No float that a TPU's generation lacks is converted by the compiler, which would spend
ten operations on each:

- v7x knows e2m1. Elsewhere it is a part of e5m2: its three low bits go where e5m2
  keeps the lowest exponent bits and the highest mantissa bit, and the number is 2^-14
  of what it was, subnormal where e2m1 is. Five operations make four numbers.
- e4m3fn on v5 and v6 has the bits of e4m3b11fnuz, which they know, at 1/16 of its
  value; only -0 is a NaN there and loses its sign.
"""

from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from qjax_kernels.compat import chip
from qjax_kernels.float_matmul.weight import FLOAT8
from qjax_kernels.scaled import Decoder

FOUR = 0x01010101  # a number in each byte of a word
E2M1_IN_E5M2 = 2.0**14
E4M3_IN_B11 = 2.0**4


def decoder(element: str, generation: str, contract: Any) -> Decoder:
    """How a generation decodes an element to the dtype that is contracted."""
    if element == "e2m1" and chip(generation).generation >= 7:
        return Decoder(partial(native, contract=contract), natural, 8)
    if element == "e2m1":
        parts = partial(halves, contract=contract)
        return Decoder(parts, pairs, 8, E2M1_IN_E5M2)
    if element == "e4m3" and stands_for_e4m3(generation):
        parts = partial(reinterpreted, contract=contract)
        return Decoder(parts, natural, 1, E4M3_IN_B11)
    return Decoder(partial(plain, contract=contract), natural, 1)


def stands_for_e4m3(generation: str) -> bool:
    """Whether e4m3b11fnuz, being native, takes the place of e4m3fn."""
    return chip(generation).is_matmul_supported(FLOAT8["e4m3b11"], FLOAT8["e4m3b11"])


def natural(size: int) -> np.ndarray:
    """Inputs in their own order."""
    return np.arange(size)[None]


def pairs(size: int) -> np.ndarray:
    """Even inputs, then odd ones."""
    return np.arange(size).reshape(-1, 2).T


def plain(
    codes: Any, table: Any, first: int, size: int, columns: Any, contract: Any
) -> list[Any]:
    """What the hardware converts by itself."""
    return [codes[first : first + size, columns].astype(contract)]


def native(
    codes: Any, table: Any, first: int, size: int, columns: Any, contract: Any
) -> list[Any]:
    """e2m1 as v7x converts it."""
    words = codes[first // 8 : (first + size) // 8, columns]
    return [pltpu.bitcast(words, jnp.float4_e2m1fn).astype(contract)]


def halves(
    codes: Any, table: Any, first: int, size: int, columns: Any, contract: Any
) -> list[Any]:
    """e2m1 as e5m2: the low, then the high nibble of every byte."""
    words = codes[first // 8 : (first + size) // 8, columns]
    sign, rest = jnp.uint32(0x80 * FOUR), jnp.uint32(0x0E * FOUR)
    low = ((words << 4) & sign) | ((words << 1) & rest)
    high = (words & sign) | ((words >> 3) & rest)
    e5m2 = FLOAT8["e5m2"]
    return [pltpu.bitcast(half, e5m2).astype(contract) for half in (low, high)]


def reinterpreted(
    codes: Any, table: Any, first: int, size: int, columns: Any, contract: Any
) -> list[Any]:
    """e4m3fn as e4m3b11fnuz."""
    words = pltpu.bitcast(codes[first : first + size, columns], jnp.uint32)
    return [pltpu.bitcast(unsigned_zero(words), FLOAT8["e4m3b11"]).astype(contract)]


def unsigned_zero(words: Any) -> Any:
    """Four float8 in a word, -0 as 0."""
    magnitude = jnp.uint32(0x7F * FOUR)
    # The highest bit of every byte is set where the seven others are not all zero.
    return words & (((words & magnitude) + magnitude) | magnitude)
