"""What the shared kernel is given, sizes of its grid step, and whether they fit."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from math import lcm
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax_kernels.compat import chip

LANES, SUBLANES, MIB = 128, 8, 2**20
LEAST_LIMIT = 16 * MIB  # the compiler's own default on most generations
ROOM = 4 * MIB  # what the compiler keeps beside the arrays that a kernel names


@dataclass(frozen=True)
class Decoder:
    """How stored rows become numbers in VMEM.

    Args:
      parts: of `(codes_ref, table_ref, first, size, columns)`: the inputs `first` to
        `first + size` as a list of equal arrays in the dtype that is contracted.
      order: of a size: which input each row of each part is, `[parts, size / parts]`.
        Inputs that share a stored row are in neighbouring rows of every part.
      per_row: inputs in one stored row; a fraction where codes cross words.
      factor: static, on every decoded number: `w = factor * decoded * scale`.
      crosses: whether `parts` reads words as `crossing.apart` leaves them.
    """

    parts: Callable[..., list[Any]]
    order: Callable[[int], np.ndarray]
    per_row: int | Fraction
    factor: float = 1.0
    crosses: bool = False

    @property
    def unit(self) -> int:
        """Inputs in whole registers of stored rows."""
        if self.per_row == 1:
            return SUBLANES * 4
        # Where codes cross words: whole registers of each of the words they cross.
        return Fraction(SUBLANES * self.per_row).numerator


@dataclass(frozen=True)
class Operands:
    """`w[K, N] = decoded * scale`, scales for `group` inputs of one output. A pytree.

    Attributes:
      codes: `[rows, N]`, `per_row` inputs in each.
      scale: `[G, N]`: float, or `uint8` exponents of two, 127 is 1 (e8m0).
      group: inputs that share a scale; None for all of them.
      K: number of inputs.
      table: of the decoder, `uint32[16, 1]`, or None.
    """

    codes: Any
    scale: Any
    group: int | None
    K: int
    table: Any = None

    @property
    def N(self) -> int:
        """Number of outputs."""
        return self.codes.shape[1]

    @property
    def late(self) -> bool:
        """Whether one scale of an output is put on its finished sum."""
        return self.scale.shape[0] == 1

    def rows(self, decoder: Decoder) -> int:
        """Inputs in the stored rows, those that fill the last one included."""
        return int(self.codes.shape[0] * decoder.per_row)


jax.tree_util.register_dataclass(Operands, ["codes", "scale", "table"], ["group", "K"])


@dataclass(frozen=True)
class Blocks:
    """One grid step.

    Args:
      m: tokens.
      n: outputs.
      k: inputs.
      tile: outputs computed at a time; 0 is `n`.
      chunk: inputs decoded at a time; 0 is the least that registers allow.
      scale_on: "sums" of each group, or "weights" (bfloat16 but on v5: float32).

    Raises:
      ValueError: an unknown word.
    """

    m: int
    n: int
    k: int
    tile: int = 0
    chunk: int = 0
    scale_on: str = "sums"

    def __post_init__(self):
        if self.scale_on not in ("sums", "weights"):
            raise ValueError(
                f'Blocks.scale_on is {self.scale_on!r}; it must be "sums" or "weights"'
            )

    def fitted(self, M: int, given: Operands, decoder: Decoder) -> "Blocks":
        """No larger than the problem, with whole groups and registers along K.

        Where K has no such divisor, one step takes all of it.
        """
        rows = given.rows(decoder)
        group = 1 if given.late or given.group is None else given.group
        least = lcm(decoder.unit, group)
        k = divisor(rows, self.k, lcm(least, LANES))
        n = min(self.n, -(-given.N // LANES) * LANES)
        n = given.N if n > given.N else n
        tile = min(self.tile or n, n)
        tile = tile if n % tile == 0 else n
        chunk = divisor(k, max(self.chunk, least), least)
        return replace(self, m=min(self.m, M), n=n, k=k, tile=tile, chunk=chunk)


def divisor(size: int, most: int, unit: int) -> int:
    """The largest divisor of `size` up to `most` in whole units; else `size`."""
    found = range(most // unit * unit, 0, -unit)
    return next((k for k in found if size % k == 0), size)


def vmem_bytes(blocks: Blocks, given: Operands, decoder: Decoder, x_bytes: int) -> int:
    """VMEM of one grid step: double-buffered blocks, scratch, decoded weights."""
    m, n, k = up(blocks.m, SUBLANES), up(blocks.n, LANES), up(blocks.k, LANES)
    G, tile = up(given.scale.shape[0], SUBLANES), up(blocks.tile, LANES)
    stored = k // decoder.per_row * jnp.dtype(given.codes.dtype).itemsize
    streamed = m * k * x_bytes + stored * n + m * n * 4 + m * LANES * 4
    streamed += G * n * jnp.dtype(given.scale.dtype).itemsize
    scratch = m * n * 4 + G * n * 4
    return 2 * streamed + scratch + k * tile * 4 + m * tile * 8


def too_large(
    generation: str, blocks: Blocks, given: Operands, decoder: Decoder, x_bytes: int
) -> str:
    """That the blocks need more VMEM than there is; empty if they do not."""
    capacity = chip(generation).vmem_capacity_bytes
    needed = vmem_bytes(blocks, given, decoder, x_bytes) + ROOM
    if needed <= capacity:
        return ""
    return (
        f"blocks m={blocks.m}, n={blocks.n}, k={blocks.k} need about "
        f"{needed / MIB:.0f} MiB of VMEM; {generation} has {capacity / MIB:.0f} MiB"
    )


def require(
    generation: str, blocks: Blocks, given: Operands, decoder: Decoder, x_bytes: int
) -> None:
    """That the blocks fit into VMEM.

    Raises:
      ValueError: they do not.
    """
    problem = too_large(generation, blocks, given, decoder, x_bytes)
    if problem:
        raise ValueError(problem)


def vmem_limit(needed: int) -> int:
    """The limit to give to the compiler for arrays of so many bytes."""
    return max(LEAST_LIMIT, up(needed + ROOM, MIB))


def up(size: int, unit: int) -> int:
    """`size` in whole units."""
    return -(-size // unit) * unit
