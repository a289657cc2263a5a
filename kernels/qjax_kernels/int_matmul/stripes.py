"""Who computes what on a GPU: stripes of equal length over all outputs and inputs.

A unit is one tile of outputs, for a block of tokens, over 128 inputs. Units are
numbered along the inputs first, then blocks of tokens, then outputs. Every program
takes the next `each` units, also where these end in the middle of a sum (stream-K;
Osama et al., 2023, https://arxiv.org/abs/2301.03598; Marlin's stripes): the machine is
full at any shape. Sums in several pieces are kept in as many slots and added by XLA.
"""

from dataclasses import dataclass

import numpy as np

from qjax_kernels.int_matmul.fragments import INPUTS


@dataclass(frozen=True)
class Stripes:
    """The schedule of one product.

    Attributes:
      steps: units along the inputs.
      token_blocks: units along the tokens.
      output_tiles: units along the outputs.
      each: units of one program; the last may have fewer.
    """

    steps: int
    token_blocks: int
    output_tiles: int
    each: int

    @property
    def units(self) -> int:
        """All of them."""
        return self.steps * self.tiles

    @property
    def tiles(self) -> int:
        """Sums: blocks of tokens by tiles of outputs."""
        return self.token_blocks * self.output_tiles

    @property
    def programs(self) -> int:
        """Programs that have something to do."""
        return -(-self.units // self.each)

    def pieces(self) -> np.ndarray:
        """How many programs share each sum, `[output_tiles, token_blocks]`."""
        first = np.arange(self.tiles) * self.steps
        shared = (first + self.steps - 1) // self.each - first // self.each + 1
        return shared.reshape(self.output_tiles, self.token_blocks)

    @property
    def slots(self) -> int:
        """The most programs that share a sum."""
        return int(self.pieces().max())


def stripes(
    M: int, K: int, N: int, tokens: int, outputs: int, programs: int, whole: bool
) -> Stripes:
    """Stripes of about equal length.

    Args:
      M: tokens.
      K: inputs.
      N: outputs.
      tokens: of one unit.
      outputs: of one unit.
      programs: that the machine runs at once.
      whole: do not cut sums.
    """
    steps, blocks, tiles = -(-K // INPUTS), -(-M // tokens), -(-N // outputs)
    units = steps * blocks * tiles
    each = -(-units // programs)
    if whole:
        each = -(-each // steps) * steps
    return Stripes(steps, blocks, tiles, each)
