"""HQQ: Half-Quadratic Quantization (Badri and Shaji, 2023).

https://mobiusml.github.io/hqq_blog

Finds the zero points `z` (kept as floats) which minimise `||w - s (q - z)||_p^p`,
`p < 1`, from the weights alone. With an auxiliary error `e` the problem splits into

    e <- shrink(w - s (q - z)),   shrink(d) = sign(d) relu(|d| - |d|^(p-1) / beta)
    z <- mean over the group of  q - (w - e) / s,         q = clip(round(w / s + z))

with `beta` growing by `kappa` each time.

Differences from the reference implementation (package `hqq`): each group keeps the zero
point with the least mean absolute error of its own, where the reference stops the whole
matrix when its mean error stops falling; `beta` grows, as in the paper, where the
default path of the reference forgets it; codes are found again after scale and zero
point are rounded to the dtype they are stored in; a group of tiny range keeps its
scale, where the reference takes 1 below a range of 1e-4 and clips `1/s` at 2e4.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Shaped

from qjax.core.coded import Coded, pack_codes
from qjax.core.formats import Int, group
from qjax.core.granularity import Granularity, to_blocks
from qjax.core.qtensor import Activation
from qjax.core.scales import Grid
from qjax.methods.base import check_patterns, positive_integer, within


def shrink(
    d: Float32[Array, "*shape"], beta: Any, p: float
) -> Float32[Array, "*shape"]:
    """The proximal step of `|.|^p`: small errors vanish, large ones barely move."""
    threshold = beta ** np.float32(-1 / (2 - p))

    def large(d):
        size = jnp.abs(d)
        moved = jnp.sign(d) * (size - size ** np.float32(p - 1) / beta)
        return jnp.where(size > threshold, moved, np.float32(0))

    # Weights of a language model never reach the threshold (0.17 with the defaults):
    # this spares them the power, which costs more than all the rest.
    return lax.cond(jnp.max(jnp.abs(d)) > threshold, large, jnp.zeros_like, d)


def solve_groups(
    w: Float32[Array, "members groups"],
    valid: Bool[Array, "members groups"] | None,
    method: "HQQ",
    dtype: Any,
) -> tuple[Float[Array, "groups"], Float[Array, "groups"]]:
    """Scale and zero point of each column of weights, rounded to `dtype`.

    `valid` is False on the padding of partial groups.
    """
    levels = 2**method.format.bits - 1
    low = jnp.min(w, 0, where=valid, initial=np.inf)
    high = jnp.max(w, 0, where=valid, initial=-np.inf)
    # Halves, so that a range as wide as float32 does not overflow.
    width = (high * np.float32(0.5) - low * np.float32(0.5)) / np.float32(levels / 2)
    scale = jnp.where(width == 0, np.float32(1), width).astype(dtype)
    s = scale.astype(jnp.float32)
    inverse = np.float32(1) / s

    def step(i, state):
        zero, best, least = state
        q = jnp.clip(jnp.round(w * inverse + zero), 0, levels)
        d = w - (q - zero) * s
        error = jnp.mean(jnp.abs(d), 0, where=valid)
        best = jnp.where(error < least, zero, best)
        least = jnp.minimum(error, least)
        growth = np.float32(method.kappa) ** i.astype(jnp.float32)
        e = shrink(d, np.float32(method.beta) * growth, method.p)
        zero = jnp.mean(q - (w - e) * inverse, 0, where=valid)
        return zero, best, least

    zero = -low * inverse
    start = zero, zero, jnp.full_like(zero, np.inf)
    _, zero, _ = lax.fori_loop(0, method.iters + 1, step, start)
    return scale, zero.astype(dtype)


def half_quadratic(w: Float[Array, "... K N"], method: "HQQ") -> Grid:
    """The grid of HQQ: `scale` and float `zero`, `[..., Gk, Gn]`.

    Rows of groups are solved one after the other, all iterations of one before the next
    begins: they are independent, and the weights at hand stay in the cache.
    """
    granularity, (K, N) = method.format.granularity, w.shape[-2:]
    Gk, Gn = granularity.counts(K, N)
    name = method.format.scale_dtype
    dtype = w.dtype if name is None else jnp.dtype(name)
    blocks = to_blocks(w, granularity)
    valid = _valid(granularity, K, N)

    def solve_row(each):
        row, number = each
        members = _members(row).astype(jnp.float32)
        mask = None if valid is None else _members(valid[number % Gk])
        return solve_groups(members, mask, method, dtype)

    rows = blocks.reshape(-1, *blocks.shape[-3:])
    scale, zero = lax.map(solve_row, (rows, jnp.arange(rows.shape[0])))
    shape = (*w.shape[:-2], Gk, Gn)
    return Grid(scale.reshape(shape), zero.reshape(shape))


def _members(
    row: Shaped[Array, "rows groups cols"],
) -> Shaped[Array, "members groups"]:
    """The weights of each group as one column."""
    return jnp.swapaxes(row, 1, 2).reshape(-1, row.shape[1])


def _valid(
    granularity: Granularity, K: int, N: int
) -> Bool[Array, "Gk rows Gn cols"] | None:
    """Which places of the blocks hold a weight; None if all do."""
    rows, cols = granularity.block(K, N)
    if K % rows == 0 and N % cols == 0:
        return None
    return to_blocks(jnp.ones((K, N), bool), granularity)


@dataclass(frozen=True)
class HQQ:
    """Half-Quadratic Quantization: float zero points from the weights alone.

    Args:
      bits: 1 to 8; 4 unless `weights` is given.
      group_size: weights along K that share a scale; 64 (the reference's default)
        unless `weights` is given.
      weights: the whole format, `Int(..., zero="float")`, in place of the two above.
      p: exponent of the error, in (0, 1]; 0.7, as in the paper.
      beta: weight of the auxiliary error at the start; 10, as in the reference.
      kappa: growth of `beta` per iteration, at least 1; 1.01, as in the reference.
      iters: updates of the zero point; 20, as in the reference.
      activations: how the input of the contraction is coded; None leaves it in float.
      targets: patterns of the sites to take; None takes all but the head, routers and
        embeddings.
      ignore: patterns of the sites to leave.

    Raises:
        ValueError: a field out of range, or `weights` beside `bits` or `group_size`.
    """

    bits: int | None = None
    group_size: int | None = None
    weights: Int | None = None
    p: float | int = 0.7
    beta: float | int = 10
    kappa: float | int = 1.01
    iters: int = 20
    activations: Activation | None = None
    targets: str | tuple[str, ...] | None = None
    ignore: str | tuple[str, ...] = ()

    def __post_init__(self):
        within("HQQ", "p", self.p, 0, 1)
        within("HQQ", "beta", self.beta, 0, np.inf)
        if not 1 <= self.kappa < np.inf:
            raise ValueError(f"HQQ.kappa must be in [1, inf), got {self.kappa!r}")
        positive_integer("HQQ", "iters", self.iters)
        check_patterns("HQQ", self.targets, self.ignore)
        self._check_format()

    def _check_format(self):
        if self.weights is None:
            for field in ("bits", "group_size"):
                if getattr(self, field) is not None:
                    positive_integer("HQQ", field, getattr(self, field))
            if (self.bits or 4) > 8:
                raise ValueError(f"HQQ.bits must be 1 to 8, got {self.bits}")
            return
        if self.bits is not None or self.group_size is not None:
            raise ValueError(
                "HQQ.weights already says bits and group size; leave out "
                f"bits={self.bits} and group_size={self.group_size}"
            )
        if not isinstance(self.weights, Int) or self.weights.zero != "float":
            raise ValueError(
                f'HQQ.weights must be an Int with zero="float", got {self.weights}'
            )

    @property
    def format(self) -> Int:
        """How the weights are stored."""
        if self.weights is not None:
            return self.weights
        size = group(64 if self.group_size is None else self.group_size)
        return Int(4 if self.bits is None else self.bits, size, zero="float")

    @property
    def activation(self) -> Activation | None:
        """How the input of the contraction is coded."""
        return self.activations

    @property
    def random(self) -> bool:
        """HQQ draws no random numbers."""
        return False

    def solve(self, w: Float[Array, "... K N"], key: Any = None) -> tuple[Coded, ...]:
        """The coded weights, in one part."""
        grid = half_quadratic(w, self)
        codes = self.format.to_codes(w, grid)
        return (pack_codes(codes, grid, self.format, w.shape[-2:]),)
