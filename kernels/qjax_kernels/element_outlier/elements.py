"""Outlier weights sorted into tiles, one word each: what a TPU's kernel reads."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

TILE = 128
SLOTS = 128  # entries of a tile are padded to multiples of this


@dataclass(frozen=True)
class Elements:
    """A sparse `S[K, N]` in tiles of 128 x 128. A pytree.

    Attributes:
      words: uint32 `[ceil(N/128), ceil(K/128), slots]`: the value in bfloat16 in the
        upper half, then 0, the row in its tile (7 bits) and the column (7 bits).
        Unused slots are 0.
      shape: `(K, N)`.
    """

    words: Any
    shape: tuple[int, int]


jax.tree_util.register_dataclass(Elements, ["words"], ["shape"])


def pack(values: Any, rows: Any, cols: Any, shape: tuple[int, int]) -> Elements:
    """Sort `values[n]` at `(rows, cols)` into tiles, once, when a weight is loaded.

    Entries of value 0, which fill records up, are dropped; several at one place add up
    in the product. Values are rounded to bfloat16. On the host.

    Raises:
      ValueError: a place is outside of `shape`, or a value is beyond bfloat16.
    """
    K, N = shape
    values, rows, cols = (np.asarray(x).reshape(-1) for x in (values, rows, cols))
    there = values != 0
    values, rows, cols = values[there], rows[there], cols[there]
    outside = (rows < 0) | (rows >= K) | (cols < 0) | (cols >= N)
    if outside.any():
        at = int(np.flatnonzero(outside)[0])
        raise ValueError(
            f"an outlier is at ({rows[at]}, {cols[at]}); the weight has shape {shape}"
        )
    halves = np.asarray(jnp.asarray(values, jnp.bfloat16)).view(np.uint16)
    if not np.isfinite(halves.view(jnp.bfloat16).astype(np.float32)).all():
        raise ValueError("an outlier is not finite in bfloat16")
    down, right = (-(-size // TILE) for size in shape)
    tile = (cols // TILE) * down + rows // TILE
    counts = np.bincount(tile, minlength=down * right)
    slots = max(-(-int(counts.max(initial=0)) // SLOTS), 1) * SLOTS
    order = np.argsort(tile, kind="stable")
    starts = np.cumsum(counts) - counts
    place = np.arange(len(tile)) - starts[tile[order]]
    words = np.zeros((right * down, slots), np.uint32)
    low = (rows % TILE) << 7 | cols % TILE
    entries = halves.astype(np.uint32) << 16 | low.astype(np.uint32)
    words[tile[order], place] = entries[order]
    return Elements(jnp.asarray(words.reshape(right, down, slots)), (K, N))
