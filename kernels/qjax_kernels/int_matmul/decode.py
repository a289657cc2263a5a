"""Codes in VMEM to numbers that the matrix unit takes.

A register of 32-bit words has 8 sublanes; reinterpreted as `b`-bit integers it has
`8 * 32 / b` rows, and row `s * 32/b + i` is the field `i` of word `s`: exactly how
words are packed along K. Nothing is shuffled.
"""

from math import lcm
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from qjax_kernels import crossing
from qjax_kernels.coded import WORD

NARROW = {2: jnp.int2, 4: jnp.int4}
BFLOAT16_128 = 0x43004300  # a pair of 128.0, whose mantissas take codes of up to 7 bits
BIAS, LANES = 128, 128


def native(codes_ref: Any, first: int, size: int, columns: Any, bits: int) -> Any:
    """Signed codes of `size` inputs from `first` on, as narrow integers.

    Flipping the highest bit of an unsigned code makes it the two's complement of `q`.
    """
    if bits == 8:
        return codes_ref[first : first + size, columns]
    fields = WORD // bits
    words = codes_ref[first // fields : (first + size) // fields, columns]
    flip = sum(1 << (bits * i + bits - 1) for i in range(fields))
    return pltpu.bitcast(words ^ jnp.uint32(flip), NARROW[bits])


def offset(codes_ref: Any, first: int, size: int, columns: Any, bits: int) -> Any:
    """`128 + u` of unsigned codes `u` in bfloat16, inputs in the order of `positions`.

    Two fields of a word, 16 bits apart, become a pair of bfloat16 by one mask and one
    `or`; the vector unit needs no conversion.
    """
    if bits == crossing.BITS:
        words = crossing.joined(codes_ref, first, size, columns.start, columns.size)
        return jnp.concatenate(_pairs(words, crossing.SHIFTS, bits))
    fields, length = WORD // bits, span(bits, size)
    parts = []
    for start in range(first, first + size, length):
        rows = slice(start // fields, (start + length) // fields)
        words = [codes_ref[rows, columns]] * (fields // 2)
        parts += _pairs(words, range(0, WORD // 2, bits), bits)
    return jnp.concatenate(parts)


def _pairs(words: list[Any], shifts: Any, bits: int) -> list[Any]:
    mask = jnp.uint32((2**bits - 1) * 0x10001)
    pairs = ((word >> at) & mask for word, at in zip(words, shifts))
    return [pltpu.bitcast(x | jnp.uint32(BFLOAT16_128), jnp.bfloat16) for x in pairs]


def span(bits: int, chunk: int) -> int:
    """Inputs among which `offset` changes the order, where it decodes `chunk`."""
    if bits == crossing.BITS or chunk % LANES:
        return chunk
    return LANES


def moves(bits: int, chunk: int, k: int) -> np.ndarray:
    """What puts columns of `x` into the order of `offset`: bool `[width, width]`.

    `x[:, at : at + width] @ moves` for every `width` of the `k` inputs of a step; whole
    lanes where these are. A product with a permutation is exact, and far cheaper than
    moving single lanes.
    """
    length = span(bits, chunk)
    one = np.arange(length)[:, None] == positions(bits, length)
    together = lcm(length, LANES)
    count = together // length if k % together == 0 else 1
    return np.kron(np.eye(count, dtype=bool), one)


def positions(bits: int, chunk: int) -> np.ndarray:
    """Which input of a span each decoded row is.

    Row `2s + h` of part `p` is input `s * fields + p + h * fields/2`; for 3 bits, see
    `crossing.order`.
    """
    if bits == crossing.BITS:
        return crossing.order(chunk).reshape(-1)
    fields = WORD // bits
    order = np.arange(chunk).reshape(chunk // fields, 2, fields // 2)
    return order.transpose(2, 0, 1).reshape(-1)
