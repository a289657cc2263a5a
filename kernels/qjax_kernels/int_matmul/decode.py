"""Codes in VMEM to numbers that the matrix unit takes.

A register of 32-bit words has 8 sublanes; reinterpreted as `b`-bit integers it has
`8 * 32 / b` rows, and row `s * 32/b + i` is the field `i` of word `s`: exactly how
words are packed along K. Nothing is shuffled.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from qjax_kernels import crossing
from qjax_kernels.coded import WORD

NARROW = {2: jnp.int2, 4: jnp.int4}
BFLOAT16_128 = 0x43004300  # a pair of 128.0, whose mantissas take codes of up to 7 bits
BIAS = 128


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
    """`128 + u` of unsigned codes `u` in bfloat16, inputs in the order of `interleave`.

    Two fields of a word, 16 bits apart, become a pair of bfloat16 by one mask and one
    `or`; the vector unit needs no conversion.
    """
    if bits == crossing.BITS:
        words = crossing.joined(codes_ref, first, size, columns.start, columns.size)
        shifts: Any = crossing.SHIFTS
    else:
        fields = WORD // bits
        stored = codes_ref[first // fields : (first + size) // fields, columns]
        words, shifts = [stored] * (fields // 2), range(0, WORD // 2, bits)
    mask = jnp.uint32((2**bits - 1) * 0x10001)
    pairs = ((word >> at) & mask for word, at in zip(words, shifts))
    parts = [pltpu.bitcast(x | jnp.uint32(BFLOAT16_128), jnp.bfloat16) for x in pairs]
    return jnp.concatenate(parts)


def interleave(x: Any, bits: int, chunk: int) -> jax.Array:
    """Columns of `x[M, K]` in the order in which `offset` decodes chunks of inputs."""
    M, K = x.shape
    order = positions(bits, chunk)
    # A product with a permutation is exact, and far cheaper than moving single lanes.
    moves = jnp.asarray(np.arange(chunk)[:, None] == order, x.dtype)
    parts = x.reshape(M, K // chunk, chunk)
    moved = jnp.einsum("mgc,cd->mgd", parts, moves, preferred_element_type=jnp.float32)
    return moved.astype(x.dtype).reshape(M, K)


def positions(bits: int, chunk: int) -> np.ndarray:
    """Which input of a chunk each decoded row is.

    Row `2s + h` of part `p` is input `s * fields + p + h * fields/2`; for 3 bits, see
    `crossing.order`.
    """
    if bits == crossing.BITS:
        return crossing.order(chunk).reshape(-1)
    fields = WORD // bits
    order = np.arange(chunk).reshape(chunk // fields, 2, fields // 2)
    return order.transpose(2, 0, 1).reshape(-1)
