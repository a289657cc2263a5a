"""Codes in the order in which a Hopper GPU's matrix unit takes them from registers.

`wgmma` takes 64 rows by 16 columns of its left operand from the registers of 128
threads (PTX ISA, "Register fragments for wgmma.mma_async.m64nNk16", matrix A). Here the
rows are outputs, the columns inputs. A tile is 64 outputs by 128 inputs: 32 pairs of
neighbouring inputs for every thread, each pair in the two halves of a word, so that a
mask and an `or` make a pair of bfloat16 out of it. A thread's words lie so that all
threads read 16 bytes each, without bank conflicts. Same bytes as plain codes.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

OUTPUTS, INPUTS = 64, 128  # of a tile
THREADS, PAIRS = 128, 32
BITS = (2, 3, 4, 8)
BOTH = 0x10001  # one field in both halves of a word


@dataclass(frozen=True)
class TiledWeight:
    """`w[K, N] = (q - zero) * scale`, as `IntWeight`, in tiles. A pytree.

    Attributes:
      codes: `uint32[ceil(N/64), ceil(K/128), 2 bits, 128]`; below 8 bits unsigned
        codes, at 8 two's complement; the last tiles are filled with `q = 0`.
      scale: float `[G, N]`.
      zero: of `q`, `[G, N]` int8 or float; None for symmetric codes.
      bits: 2, 3, 4 or 8.
      group: inputs that share a scale; None for all of them.
      K: number of inputs.
    """

    codes: Any
    scale: Any
    zero: Any
    bits: int
    group: int | None
    K: int

    @property
    def N(self) -> int:
        """Number of outputs."""
        return self.scale.shape[-1]

    @property
    def groups(self) -> int:
        """Number of scales along K."""
        return -(-self.K // (self.group or self.K))


jax.tree_util.register_dataclass(
    TiledWeight, ["codes", "scale", "zero"], ["bits", "group", "K"]
)


@cache
def positions() -> np.ndarray:
    """Where in a tile the thread's pairs lie: `[128, 32, 2]` of `output * 128 + input`.

    Pair `4 s + r` is register `r` of the `s`-th step of 16 inputs.
    """
    thread, pair, one = np.ogrid[:THREADS, :PAIRS, :2]
    warp, lane = thread // 32, thread % 32
    step, register = pair // 4, pair % 4
    output = 16 * warp + lane // 4 + 8 * (register % 2)
    column = 16 * step + 8 * (register // 2) + 2 * (lane % 4) + one
    return output * INPUTS + column


@cache
def pieces(bits: int) -> tuple[tuple[tuple[int, int, int], ...], ...]:
    """For each pair, the (word, shift, mask) whose fields add up to its codes.

    3 bits: five pairs in each of six words, and the last two pairs bit by bit in what
    is left of them.
    """
    if bits != 3:
        fit = 16 // bits
        mask = 2**bits - 1
        return tuple(((i // fit, bits * (i % fit), mask),) for i in range(PAIRS))
    whole = [((i // 5, 3 * (i % 5), 7),) for i in range(30)]
    spread = [tuple((3 * j + b, 15 - b, 1 << b) for b in range(3)) for j in range(2)]
    return tuple(whole + spread)


def _table(bits: int) -> tuple[np.ndarray, np.ndarray, jax.Array, jax.Array]:
    """The pieces as columns: pair, word, shift, and mask of both halves."""
    rows = [(i, *one) for i, parts in enumerate(pieces(bits)) for one in parts]
    pair, word, shift, mask = np.array(rows, np.uint32).T
    return pair, word, jnp.asarray(shift), jnp.asarray(mask * np.uint32(BOTH))


def words_each(bits: int) -> int:
    """Words of a tile that one thread reads."""
    return PAIRS * bits // 16


def read_at_once(bits: int) -> int:
    """Words that a thread reads at once."""
    return 2 if bits == 3 else 4


def pack_tiles(codes: Any, bits: int) -> jax.Array:
    """Codes `[..., K, N]` to words `[..., N/64, K/128, 2 bits, 128]`.

    Args:
      codes: below 8 bits unsigned `u = q + 2^(bits-1)`, at 8 bits `q` as int8.
      bits: 2, 3, 4 or 8.
    """
    fill = 2 ** (bits - 1) if bits < 8 else 0
    *lead, K, N = codes.shape
    short = [(0, 0)] * len(lead) + [(0, -K % INPUTS), (0, -N % OUTPUTS)]
    full = jnp.pad(codes.astype(jnp.uint8), short, constant_values=fill)
    tiles = full.reshape(*lead, -1, INPUTS, full.shape[-1] // OUTPUTS, OUTPUTS)
    tiles = jnp.moveaxis(tiles, (-2, -1, -4, -3), (-4, -2, -3, -1))
    tiles = tiles.reshape(*tiles.shape[:-2], OUTPUTS * INPUTS)
    pairs = tiles[..., positions()].astype(jnp.uint32)
    halves = pairs[..., 0] | (pairs[..., 1] << 16)
    pair, word, shift, mask = _table(bits)
    fields = (halves[..., pair] & mask) << shift
    by_word = fields[..., np.argsort(word, kind="stable")]
    words = by_word.reshape(*by_word.shape[:-1], words_each(bits), -1)
    return _by_reads(words.sum(-1, dtype=jnp.uint32), read_at_once(bits))


def unpack_tiles(words: Any, bits: int, K: int, N: int) -> jax.Array:
    """Undo `pack_tiles`: int8 at 8 bits, else uint8, `[..., K, N]`."""
    by_thread = _by_threads(words, read_at_once(bits))
    pair, word, shift, mask = _table(bits)
    fields = (by_thread[..., word] >> shift) & mask
    # Fields of one pair lie side by side; most pairs have one.
    halves = fields[..., np.searchsorted(pair, np.arange(PAIRS))]
    for more in range(1, np.bincount(pair).max()):
        at = np.flatnonzero(np.bincount(pair) > more)
        halves = halves.at[..., at].add(fields[..., np.searchsorted(pair, at) + more])
    codes = jnp.stack([halves & 0xFFFF, halves >> 16], -1).astype(jnp.uint8)
    order = np.argsort(positions().reshape(-1))
    tiles = codes.reshape(*codes.shape[:-3], -1)[..., order]
    tiles = tiles.reshape(*tiles.shape[:-1], OUTPUTS, INPUTS)
    rows = jnp.moveaxis(tiles, (-4, -2, -3, -1), (-2, -1, -4, -3))
    *lead, kt, inputs, nt, outputs = rows.shape
    codes = rows.reshape(*lead, kt * inputs, nt * outputs)[..., :K, :N]
    return jax.lax.bitcast_convert_type(codes, jnp.int8) if bits == 8 else codes


def _by_reads(words: Any, at_once: int) -> jax.Array:
    """`[..., thread, word]` so that one read of all threads is contiguous."""
    *lead, threads, count = words.shape
    reads = words.reshape(*lead, threads, count // at_once, at_once)
    return jnp.swapaxes(reads, -3, -2).reshape(*lead, count, threads)


def _by_threads(words: Any, at_once: int) -> jax.Array:
    """Undo `_by_reads`."""
    lead = words.shape[:-2]
    reads = words.reshape(*lead, -1, THREADS, at_once)
    return jnp.swapaxes(reads, -3, -2).reshape(*lead, THREADS, -1)


def tiled(
    codes: Any, scale: Any, zero: Any, bits: int, group: int | None
) -> TiledWeight:
    """A weight in tiles; done once, when it is loaded.

    Args:
      codes: as for `pack_tiles`.
      scale: float `[..., G, N]`.
      zero: of `q`, `[..., G, N]`; None for symmetric codes.
      bits: 2, 3, 4 or 8.
      group: inputs that share a scale; None for all of them.
    """
    K = codes.shape[-2]
    return TiledWeight(pack_tiles(codes, bits), scale, zero, bits, group, K)
