"""Indices in VMEM to levels in bfloat16, by gathers along sublanes.

One gather finds 32 bits for each of eight indices of a column: two levels, those whose
indices differ in the fourth bit, which then chooses the half. Two indices 16 bits apart
in a word make the two halves of one register of bfloat16.
"""

from fractions import Fraction
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from qjax_kernels import crossing
from qjax_kernels.coded import WORD
from qjax_kernels.scaled import Decoder

HALF, EIGHT = 16, 8
LOW, HIGH = 0xFFFF, 0xFFFF0000


def decoder(bits: int) -> Decoder:
    """How indices of 2 to 4 bits are looked up."""
    return Decoder(
        partial(looked_up, bits=bits),
        partial(order, bits=bits),
        Fraction(WORD, bits),
        crosses=bits == crossing.BITS,
    )


def table(levels: Any, bits: int) -> jax.Array:
    """Pairs of levels `uint32[16, 1]`: rows 0 to 7 for low halves, then for high ones.

    Row `i` holds level `i` in the low half and `i + 8` in the high one; row `8 + i` the
    same the other way round. Levels are rounded to bfloat16.
    """
    rounded = (
        jnp.zeros(16, jnp.bfloat16)
        .at[: levels.shape[0]]
        .set(levels.astype(jnp.bfloat16))
    )
    half = lax.bitcast_convert_type(rounded, jnp.uint16).astype(jnp.uint32)
    first, second = half[:EIGHT], half[EIGHT:]
    return jnp.concatenate([first | second << HALF, second | first << HALF])[:, None]


def order(size: int, bits: int) -> np.ndarray:
    """Row `2s + h` of part `p` is input `s * fields + p + h * fields/2`.

    For 3 bits, see `crossing.order`.
    """
    if bits == crossing.BITS:
        return crossing.order(size)
    fields = WORD // bits
    inputs = np.arange(size).reshape(size // fields, 2, fields // 2)
    return inputs.transpose(2, 0, 1).reshape(fields // 2, -1)


def looked_up(
    codes: Any, levels: Any, first: int, size: int, columns: Any, bits: int
) -> list[Any]:
    """The inputs `first` to `first + size` in the order of `order`."""
    if bits == crossing.BITS:
        words = crossing.joined(codes, first, size, columns.start, columns.size)
        shifts: Any = crossing.SHIFTS
    else:
        fields = WORD // bits
        stored = codes[first // fields : (first + size) // fields, columns]
        words, shifts = [stored] * (fields // 2), range(0, HALF, bits)
    low, high = levels[:EIGHT, columns], levels[EIGHT:, columns]
    return [
        jnp.concatenate(
            [
                _pair(word[row : row + EIGHT], low, high, at, bits)
                for row in range(0, len(word), EIGHT)
            ]
        )
        for word, at in zip(words, shifts)
    ]


def _pair(words: Any, low: Any, high: Any, at: int, bits: int) -> Any:
    """The levels of two fields of every word, as rows of bfloat16."""
    below = _find(low, words, at, bits) & jnp.uint32(LOW)
    above = _find(high, words, at + HALF, bits) & jnp.uint32(HIGH)
    return pltpu.bitcast(below | above, jnp.bfloat16)


def _find(pairs: Any, words: Any, at: int, bits: int) -> Any:
    """The pair of one field's low three bits, moved to the other half by the fourth."""
    index = (words >> at) & jnp.uint32(min(2**bits, EIGHT) - 1)
    found = jnp.take_along_axis(
        pairs, index.astype(jnp.int32), axis=0, mode="promise_in_bounds"
    )
    if 2**bits <= EIGHT:
        return found
    # 16 where the fourth bit is set.
    lower = at + 3 - 4
    fourth = (words >> lower if lower >= 0 else words << -lower) & jnp.uint32(HALF)
    return found >> fourth if at < HALF else found << fourth
