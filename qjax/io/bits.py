"""Codes packed along the last axis, on the host: how checkpoints of torch lie.

Value `i` of a row occupies bits `[i*b, (i+1)*b)` of its little-endian words, least
significant bit first, as in `core/packing.py`, which packs along K.
"""

import numpy as np


def pack_rows(codes: np.ndarray, bits: int) -> np.ndarray:
    """Unsigned codes `[..., n]` as int32 words `[..., ceil(n*bits/32)]`."""
    if bits == 8:
        stream = codes.astype(np.uint8)
    else:
        each = codes.astype(np.uint8)[..., None]
        spread = np.unpackbits(each, axis=-1, count=bits, bitorder="little")
        flat = spread.reshape(*codes.shape[:-1], -1)
        stream = np.packbits(flat, axis=-1, bitorder="little")
    missing = -stream.shape[-1] % 4
    padded = np.pad(stream, [(0, 0)] * (stream.ndim - 1) + [(0, missing)])
    return np.ascontiguousarray(padded).view("<i4")


def unpack_rows(words: np.ndarray, bits: int, length: int) -> np.ndarray:
    """The first `length` codes of each row of 32-bit words, uint8."""
    stream = np.ascontiguousarray(words).view(np.uint8)
    if bits == 8:
        return stream[..., :length]
    spread = np.unpackbits(stream, axis=-1, count=length * bits, bitorder="little")
    each = spread.reshape(*words.shape[:-1], length, bits)
    return np.packbits(each, axis=-1, bitorder="little")[..., 0]
