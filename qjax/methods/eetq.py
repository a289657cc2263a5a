"""EETQ: 8-bit weights with one scale for each output feature, float activations.

https://github.com/NetEase-FuXi/EETQ, whose arithmetic is FasterTransformer's
`symmetric_quantize`:

    s_n = max_k |w_kn| / 128,     q = clip(round(w / s), -128, 127)

so that a column's largest weight, if positive, is clipped by one part in 128.

Differences from the reference implementation: ties go to the even code, where C's
`round` goes away from zero; codes are found on the scale in the dtype in which it is
stored; the interleaving of its CUDA kernels is left to a backend's packer.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from qjax.core.coded import Coded, pack_codes
from qjax.core.formats import Int, channel
from qjax.core.qtensor import Activation
from qjax.core.scales import MINMAX, Grid, block_absmax, finite_to, positive
from qjax.methods.base import check_patterns


def absmax_grid(w: Float[Array, "... K N"], format: Int) -> Grid:
    """Scales `absmax / 2^(bits-1)`, `[..., Gk, Gn]`."""
    absmax = block_absmax(w, format.granularity, MINMAX)
    scale = positive((absmax / jnp.float32(format.half)).astype(w.dtype), absmax)
    return Grid(finite_to(scale, format.half))


@dataclass(frozen=True)
class EETQ:
    """Weight-only int8 with a scale per output feature.

    Args:
      targets: patterns of the sites to take; None takes all but the head, routers and
        embeddings.
      ignore: patterns of the sites to leave.
    """

    targets: str | tuple[str, ...] | None = None
    ignore: str | tuple[str, ...] = ()

    def __post_init__(self):
        check_patterns("EETQ", self.targets, self.ignore)

    @property
    def format(self) -> Int:
        """How the weights are stored."""
        return Int(8, channel())

    @property
    def activation(self) -> Activation | None:
        """Activations stay in float."""
        return None

    @property
    def random(self) -> bool:
        """EETQ draws no random numbers."""
        return False

    def solve(self, w: Float[Array, "... K N"], key: Any = None) -> tuple[Coded, ...]:
        """The coded weights, in one part."""
        grid = absmax_grid(w, self.format)
        codes = self.format.to_codes(w, grid)
        return (pack_codes(codes, grid, self.format, w.shape[-2:]),)
