"""3-bit codes in VMEM: 32 lie in three words, and two cross from one to the next.

Every third word is read together, so that a register holds the same field of eight
threes; a TPU reads so from arrays of 128 columns, into which words are copied first.
They are then joined so that two codes lie 16 bits apart, as the two halves of a
register of bfloat16 want them; from there it is as with 4 bits.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

CODES, WORDS, BITS, HALF, LANES = 32, 3, 3, 16, 128
UNIT = 256
"""Inputs in whole registers of every third word."""

PAIRS = (
    *((code, 16 + code) for code in range(5)),
    *((11 + code, 27 + code) for code in range(5)),
    *((5 + code, 22 + code) for code in range(5)),
    (10, 21),
)
"""The codes of each pair, of 32; the second lies 16 bits above the first."""

SHIFTS = (
    *(BITS * code for code in range(5)),
    *(1 + BITS * code for code in range(5)),
    *(BITS * code for code in range(5)),
    0,
)
"""Where the first of each pair lies in its joined word."""


def apart(codes: Any, lanes: Any) -> None:
    """Copy words `[rows, n]` to `lanes[ceil(n / 128), rows, 128]`."""
    n = codes.shape[1]
    for at in range(lanes.shape[0]):
        width = min(LANES, n - at * LANES)
        lanes[at, :, :width] = codes[:, at * LANES : at * LANES + width]


def lanes_shape(rows: int, n: int) -> tuple[int, int, int]:
    """Of the memory that `apart` fills."""
    return -(-n // LANES), rows, LANES


def joined(lanes: Any, first: int, size: int, start: int, width: int) -> list[Any]:
    """Words `uint32[size / 32, width]` that hold each of `PAIRS` at its `SHIFTS`.

    Args:
      lanes: a reference to words as `apart` leaves them.
      first: input; a multiple of 32.
      size: inputs, whole threes of words.
      start: column; a multiple of 128.
      width: columns.
    """
    row, count, u = first * WORDS // CODES, size // CODES, jnp.uint32
    blocks = range(start // LANES, -(-(start + width) // LANES))

    def word(at: int) -> Any:
        rows = pl.ds(row + at, count, WORDS)
        wide = [lanes.at[block][rows, :] for block in blocks]
        return jnp.concatenate(wide, axis=1)[:, :width]

    a, b, c = (word(at) for at in range(WORDS))
    early = a & u(0x7FFF) | b & u(0x7FFF0000)
    late = b & u(0xFFFE) | c & u(0xFFFE0000)
    outer = (a >> u(15)) & u(0x7FFF) | (c << u(14)) & u(0x7FFF0000)
    across = a >> u(30) | (b << u(2)) & u(4)
    across |= (b >> u(15)) & u(0x10000) | (c << u(17)) & u(0x60000)
    return [early] * 5 + [late] * 5 + [outer] * 5 + [across]


def order(size: int) -> np.ndarray:
    """`[16, size / 16]`: row `2 j + h` of part `p` is input `32 j + PAIRS[p][h]`."""
    threes = CODES * np.arange(size // CODES)[None, :, None]
    return (threes + np.array(PAIRS)[:, None]).reshape(len(PAIRS), -1)


def unfit(weight: Any) -> str:
    """Why a kernel does not take a weight of 3 bits; empty where it does."""
    if weight.bits != BITS:
        return ""
    if weight.K % UNIT:
        return f"3-bit codes are read {UNIT} inputs at a time, and there are {weight.K}"
    if weight.groups > 1 and (weight.group or 0) % CODES:
        return f"3-bit codes have scales for whole {CODES} inputs, not {weight.group}"
    return ""
