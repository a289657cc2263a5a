"""Codes of 1 to 7 bits in `uint32` words, with no padding to a power of two.

Value `i` occupies bits `[i*b, (i+1)*b)` of a stream of 32-bit words, least significant
bit first: the layout of GPTQ's `qweight` and, transposed, of compressed-tensors.
"""

from math import ceil

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Integer, UInt32

WORD = 32


def words_for(length: int, bits: int) -> int:
    """Number of words that hold `length` codes of `bits` bits."""
    return ceil(length * bits / WORD)


def pack(
    codes: Integer[Array, "..."], bits: int, axis: int = -2
) -> UInt32[Array, "..."]:
    """Pack unsigned codes along `axis`: `[..., K, N]` to `[..., ceil(K*bits/32), N]`.

    Raises:
      ValueError: `bits` is not between 1 and 7.
    """
    _check_bits(bits)
    axis %= codes.ndim
    length = codes.shape[axis]
    values, words = _unit(bits)
    stream = _split(_pad(codes.astype(jnp.uint32), axis, values), axis, values)
    first, offset = np.divmod(np.arange(values) * bits, WORD)
    low = stream << _along(offset, axis + 1, stream.ndim)
    parts = []
    for word in range(words):
        lanes = np.flatnonzero(first == word).tolist()
        total = _slice(low, axis + 1, lanes[0], lanes[-1] + 1).sum(
            axis + 1, keepdims=True, dtype=jnp.uint32
        )
        before = lanes[0] - 1
        if before >= 0 and offset[before] + bits > WORD:
            spill = _slice(stream, axis + 1, before, before + 1)
            total |= spill >> np.uint32(WORD - offset[before])
        parts.append(total)
    packed = _merge(jnp.concatenate(parts, axis + 1), axis)
    return _slice(packed, axis, 0, words_for(length, bits))


def unpack(
    words: UInt32[Array, "..."], bits: int, length: int, axis: int = -2
) -> UInt32[Array, "..."]:
    """Undo `pack`: the first `length` codes along `axis`, still as `uint32`.

    Raises:
      ValueError: `bits` is not between 1 and 7, or the words hold another `length`.
    """
    _check_bits(bits)
    axis %= words.ndim
    if words.shape[axis] != words_for(length, bits):
        raise ValueError(
            f"{length} codes of {bits} bits fill {words_for(length, bits)} words; "
            f"got {words.shape[axis]} words on axis {axis}"
        )
    values, per_unit = _unit(bits)
    units = _split(_pad(words, axis, per_unit), axis, per_unit)
    first, offset = np.divmod(np.arange(values) * bits, WORD)
    lanes = np.bincount(first, minlength=per_unit)
    low = _repeat_words(units, axis + 1, lanes)
    codes = low >> _along(offset, axis + 1, units.ndim)
    if (offset + bits > WORD).any():
        following = _repeat_words(units, axis + 1, lanes, shift=1)
        # Two shifts, because shifting a word by all its 32 bits is undefined.
        left = _along(WORD - 1 - offset, axis + 1, units.ndim)
        codes |= (following << np.uint32(1)) << left
    codes &= np.uint32(2**bits - 1)
    return _slice(_merge(codes, axis), axis, 0, length)


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 7:
        raise ValueError(f"bits is {bits}; packed codes have 1 to 7 bits")


def _unit(bits: int) -> tuple[int, int]:
    """The smallest run of values that ends on a word's end, and its words."""
    words = bits // np.gcd(bits, WORD)
    return int(words * WORD // bits), int(words)


def _repeat_words(units: Array, axis: int, lanes: np.ndarray, shift: int = 0) -> Array:
    """Word `j + shift` of each unit, as many times as values start in word `j`."""
    count = units.shape[axis]
    parts = []
    for word, times in enumerate(lanes):
        source = min(word + shift, count - 1)
        one = _slice(units, axis, source, source + 1)
        shape = list(one.shape)
        shape[axis] = int(times)
        parts.append(jnp.broadcast_to(one, shape))
    return jnp.concatenate(parts, axis) if count > 1 else parts[0]


def _along(values: np.ndarray, axis: int, ndim: int) -> Array:
    shape = [1] * ndim
    shape[axis] = len(values)
    return jnp.asarray(values, jnp.uint32).reshape(shape)


def _pad(x: Array, axis: int, multiple: int) -> Array:
    missing = -x.shape[axis] % multiple
    if not missing:
        return x
    return jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)])


def _split(x: Array, axis: int, size: int) -> Array:
    return x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :])


def _merge(x: Array, axis: int) -> Array:
    return x.reshape(
        *x.shape[:axis], x.shape[axis] * x.shape[axis + 1], *x.shape[axis + 2 :]
    )


def _slice(x: Array, axis: int, start: int, stop: int) -> Array:
    return x[(slice(None),) * axis + (slice(int(start), int(stop)),)]
