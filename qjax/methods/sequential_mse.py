"""Sequential MSE: the range of each column that leaves the least output error (AIMET).

https://quic.github.io/aimet-pages, "Sequential MSE". For each output feature of
`w[K, N]` the candidates `range * (k + 1) / candidates` are tried, and the one is kept
for which the layer's output changes least. With `H = E[x x^T]` the error of a column is
`dw^T H dw`, so that no inputs need be kept and every candidate is one product.

Where a column has several groups of rows (AIMET has one range per channel), they are
chosen one after the other, each with the errors of all others as they are then:

    min over candidates of  d_G^T H[G, G] d_G + 2 d_G^T H[G, rest] d_rest,

starting at the whole range. The error of the layer never rises above RTN's.

AIMET compares with the output that full-precision inputs give; here both outputs have
the quantized model's inputs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32

from qjax.core.coded import pack_codes
from qjax.core.formats import Binary, Format, Granularity, Ternary
from qjax.core.granularity import spread, to_blocks
from qjax.core.hessian import mean_unit
from qjax.core.statistics import Hessian, Statistic
from qjax.core.sweep import settled, whole_grid
from qjax.methods.base import Solution, positive_integer
from qjax.methods.shared import FromStatistics


def choose_factors(
    w: Float32[Array, "K N"], h: Float32[Array, "K K"], format: Format, candidates: int
) -> Float32[Array, "Gk Gn"]:
    """By how much each block's range should shrink for the least `tr(d^T h d)`."""
    K, N = w.shape
    rows = min(format.granularity.rows or K, K)
    count, rest = divmod(K, rows)
    h = h * mean_unit(h)
    grid = format.fit(w)
    start = w - format.from_codes(format.to_codes(w, grid), grid)

    def choose(d, first, rows):
        own = lax.dynamic_slice(h, (first, first), (rows, rows))
        mine = lax.dynamic_slice(d, (first, 0), (rows, N))
        strip = lax.dynamic_slice(h, (first, 0), (rows, K))
        pull = _product(strip, d) - _product(own, mine)
        block = lax.dynamic_slice(w, (first, 0), (rows, N))
        factor, mine = choose_block(block, own, pull, mine, format, candidates)
        return lax.dynamic_update_slice(d, mine, (first, 0)), factor

    d, factors = lax.scan(
        lambda d, index: choose(d, index * rows, rows), start, jnp.arange(count)
    )
    if rest:
        _, last = choose(d, count * rows, rest)
        factors = jnp.concatenate((factors, last[None]))
    return factors


def choose_block(
    w: Float32[Array, "rows N"],
    h: Float32[Array, "rows rows"],
    pull: Float32[Array, "rows N"],
    d: Float32[Array, "rows N"],
    format: Format,
    candidates: int,
) -> tuple[Float32[Array, " Gn"], Float32[Array, "rows N"]]:
    """The factors of one row of blocks, and the error that they leave.

    Args:
      w: the block's weights.
      h: its part of the Hessian.
      pull: `H[G, rest] d_rest`.
      d: the error of the whole range.
      format: how the weights are stored.
      candidates: how many factors to try.
    """
    across = Granularity(1, format.granularity.cols)
    N = w.shape[1]

    def loss(d):
        errors = (d * (_product(h, d) + 2 * pull)).sum(0, keepdims=True)
        return to_blocks(errors, across).sum((-3, -1))[0]

    def better(k, best):
        least, factor, kept = best
        new = (k + 1).astype(jnp.float32) / np.float32(candidates)
        grid = format.fit(w * new)
        d = w - format.from_codes(format.to_codes(w, grid), grid)
        now = loss(d)
        smaller = now < least
        wide = spread(smaller[None], across, 1, N)
        return (
            jnp.where(smaller, now, least),
            jnp.where(smaller, new, factor),
            jnp.where(wide, d, kept),
        )

    least = loss(d)
    start = least, jnp.ones_like(least), d
    _, factor, kept = lax.fori_loop(0, candidates - 1, better, start)
    return factor, kept


def _product(a: Any, b: Any) -> Array:
    return jnp.matmul(a, b, precision="highest")


@dataclass(frozen=True)
class SequentialMSE(FromStatistics):
    """Round to nearest on the ranges of least output error.

    Args:
      scheme: a named pair of formats; "W4A16" is the default.
      weights: a weight format, in place of a scheme.
      activations: how the input of the contraction is coded, beside `weights`.
      calibrator: how a static activation range is found; None is `MinMaxRange()`.
      candidates: how many ranges to try for each column; 20, as in AIMET.
      targets: patterns of the sites to take; None takes all but the head, routers and
        embeddings.
      ignore: patterns of the sites to leave.

    Raises:
        ValueError: an unknown name, a field out of range, `scheme` beside a format, or
            a format whose blocks have no range of their own.
        TypeError: `calibrator` is none.
    """

    candidates: int = field(default=20, kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        positive_integer("SequentialMSE", "candidates", self.candidates)
        if isinstance(self.format, (Binary, Ternary)) or whole_grid(self.format):
            raise ValueError(
                f"SequentialMSE cannot choose ranges of {self.format.name}, whose "
                "blocks do not have one each; take a format such as Int(4, group(128))"
            )

    @property
    def statistics(self) -> dict[str, Statistic]:
        """The Hessian."""
        return {"hessian": Hessian()}

    def solve_site(
        self, w: Float[Array, "K N"], stats: Mapping[str, Any], key: Any = None
    ) -> Solution:
        """The coded weights, in one part.

        A Hessian that is not finite leaves every block the whole range.
        """
        exact, format = w.astype(jnp.float32), settled(self.format, w.dtype)
        hessian = stats["hessian"]
        factors = choose_factors(exact, hessian, format, self.candidates)
        grid = format.fit(exact * spread(factors, format.granularity, *w.shape))
        codes = format.to_codes(exact, grid)
        part = pack_codes(codes, grid, self.format, w.shape)
        return Solution((part,), notes={"dead": (jnp.diagonal(hessian) == 0).sum()})
