"""RPTQ (Yuan et al., 2023, arXiv:2304.01089): input features reordered by their ranges.

Features of one activation differ in range by orders of magnitude, but a static scale
for each of them is too many. Features are clustered by their (maximum, minimum) with
k-means, reordered so that a cluster is contiguous (`T_in` is a permutation), and each
cluster gets one asymmetric static scale and zero point (section 4.2). The weights are
quantized by any other method, their input features in the new order.

Differences from the reference implementation: k-means starts from quantiles of the
range and from features far apart, a fixed number of rounds each, and the better end is
taken, where the reference starts ten times at random; the range is the smallest and
largest value seen, where it also offers a moving average; grids include zero, as
compressed-tensors' do. Each feature keeps a copy of its cluster's scale, and the
product is taken on what the codes stand for. The permutation is a gather at run time:
it is not folded into the norm or linear that makes the activation. Attention products
(its R2, R3) are no sites of a weight.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from qjax.core.formats import Int, block
from qjax.core.qtensor import Activation
from qjax.core.scales import Grid
from qjax.core.statistics import Interval, Range, Statistic
from qjax.core.transforms import Permutation, chained
from qjax.methods.base import Calibrated, Solution, positive_integer
from qjax.methods.shared import Around


def distances(
    points: Float32[Array, "K D"], centers: Float32[Array, "R D"]
) -> Float32[Array, "K R"]:
    """Squared distance of every point from every center."""
    return jnp.square(points[:, None] - centers[None]).sum(-1)


def quantile_start(
    points: Float32[Array, "K 2"], clusters: int
) -> Float32[Array, "R 2"]:
    """Points at evenly spaced ranks of the width `maximum - minimum`."""
    order = jnp.argsort(points[:, 0] - points[:, 1])
    ranks = (2 * jnp.arange(clusters) + 1) * points.shape[0] // (2 * clusters)
    return points[order[ranks]]


def far_start(points: Float32[Array, "K 2"], clusters: int) -> Float32[Array, "R 2"]:
    """The widest point, then each time the point farthest from those before."""
    widest = points[jnp.argmax(points[:, 0] - points[:, 1])]
    centers = jnp.broadcast_to(widest, (clusters, 2))

    def add(i: Any, centers: Any) -> Any:
        return centers.at[i].set(points[distances(points, centers).min(1).argmax()])

    return jax.lax.fori_loop(1, clusters, add, centers)


def lloyd(
    points: Float32[Array, "K 2"], centers: Float32[Array, "R 2"], rounds: int
) -> tuple[Int32[Array, " K"], Float32[Array, ""]]:
    """Labels after so many rounds of k-means, and their squared error."""
    R = centers.shape[0]

    def one(_: Any, centers: Any) -> Any:
        member = jax.nn.one_hot(distances(points, centers).argmin(1), R)
        count = member.sum(0)[:, None]
        mean = jnp.matmul(member.T, points, precision="highest")
        return jnp.where(count > 0, mean / jnp.maximum(count, 1), centers)

    far = distances(points, jax.lax.fori_loop(0, rounds, one, centers))
    return far.argmin(1).astype(jnp.int32), far.min(1).sum()


def clustered(
    low: Float32[Array, " K"], high: Float32[Array, " K"], clusters: int, rounds: int
) -> Int32[Array, " K"]:
    """The cluster of each feature, numbered from the narrowest range to the widest."""
    points = jnp.stack([high, low], axis=1)
    starts = jnp.stack([quantile_start(points, clusters), far_start(points, clusters)])
    labels, errors = jax.vmap(lambda centers: lloyd(points, centers, rounds))(starts)
    best = labels[errors.argmin()]
    width = jax.ops.segment_max(high - low, best, num_segments=clusters)
    return jnp.argsort(jnp.argsort(width)).astype(jnp.int32)[best]


def cluster_grid(
    low: Float32[Array, " K"],
    high: Float32[Array, " K"],
    labels: Int32[Array, " K"],
    clusters: int,
    format: Int,
) -> Grid:
    """`scale[K, 1]` and `zero[K, 1]`: each feature has those of its cluster."""
    lows = jax.ops.segment_min(low, labels, num_segments=clusters)[labels]
    highs = jax.ops.segment_max(high, labels, num_segments=clusters)[labels]
    zero = jnp.float32(0)
    lows, highs = jnp.minimum(lows, zero), jnp.maximum(highs, zero)
    return format.grid_of(lows[:, None], highs[:, None], jnp.float32)


def reordered(statistics: Any, index: Int32[Array, " K"]) -> Any:
    """Statistics of the input with its features in a new order."""
    K = index.shape[0]

    def one(x: Any) -> Any:
        if x.shape == (K, K):
            return x[index][:, index]
        if x.shape == (K,):
            return x[index]
        raise ValueError(
            f"RPTQ.then reads a statistic of shape {x.shape}, of which it is not known "
            f"how features are ordered; ({K},) and ({K}, {K}) are"
        )

    return jax.tree.map(one, statistics)


@dataclass(frozen=True)
class RPTQ(Around):
    """Static activations in clusters of features; the weights by another method.

    Patterns and the weights' format are those of `then`.

    Args:
      then: what quantizes the reordered weights and leaves activations alone, such as
        `RTN(weights=Int(4))` or `GPTQ(weights=Int(4))` (the paper: GPTQ).
      activation_bits: 8 (W4A8) or 4 (W4A4) in the paper.
      clusters: of features; 32, the paper's for the inputs of norms' consumers and of
        the attention's output (4 elsewhere).
      rounds: of k-means. 50.

    Raises:
        ValueError: a field out of range, or `then` codes activations itself.
        TypeError: `then` quantizes no weights.
    """

    activation_bits: int = 8
    clusters: int = 32
    rounds: int = 50

    def __post_init__(self):
        super().__post_init__()
        for name in ("activation_bits", "clusters", "rounds"):
            positive_integer("RPTQ", name, getattr(self, name))
        if self.activation_bits > 8:
            raise ValueError(
                "RPTQ.activation_bits must be a whole number from 1 to 8, "
                f"got {self.activation_bits!r}"
            )
        if self.then.activation is not None:
            raise ValueError(
                f"RPTQ.then is {self.then!r}, which codes activations itself; take a "
                "weight-only scheme such as W4A16"
            )

    @property
    def calibrator(self) -> None:
        """None: the solver finds the static ranges itself."""
        return None

    @property
    def activation(self) -> Activation:
        """How the input of the contraction is coded: one grid for each feature."""
        format = Int(self.activation_bits, block(1, None), symmetric=False)
        return Activation(format, dynamic=False)

    @property
    def statistics(self) -> dict[str, Statistic]:
        """The range of each feature, and what `then` needs."""
        return {**self.needed, "range": Range()}

    @property
    def full_precision(self) -> bool:
        """Whether a full-precision stream runs beside."""
        return isinstance(self.then, Calibrated) and self.then.full_precision

    @property
    def shared(self) -> bool:
        """Whether columns are independent, but for a second scale."""
        return getattr(self.then, "shared", False)

    def solve_site(
        self, w: Float[Array, "K N"], stats: Mapping[str, Any], key: Any = None
    ) -> Solution:
        """What `then` makes of the reordered weights, with the clusters' grids."""
        seen: Interval = stats["range"]
        clusters = min(self.clusters, w.shape[0])
        labels = clustered(seen.low, seen.high, clusters, self.rounds)
        format = self.activation.format
        assert isinstance(format, Int)
        grid = cluster_grid(seen.low, seen.high, labels, clusters, format)
        index = jnp.argsort(labels).astype(jnp.int32)
        own = {name: reordered(stats[name], index) for name in self.needed}
        found = self.solve_then(w[index], own, key)
        grid = jax.tree.map(lambda x: x[index], grid)
        if found.t_in is not None:
            grid = jax.tree.map(lambda x: x[_order(found.t_in)], grid)
        used = (jnp.bincount(labels, length=clusters) > 0).sum().astype(jnp.float32)
        return replace(
            found,
            t_in=chained(Permutation(index), found.t_in),
            scale=grid.scale,
            zero=grid.zero,
            notes={**found.notes, "clusters": used},
        )


def _order(t_in: Any) -> Any:
    """The order of features that `then` asks for on top.

    Raises:
        TypeError: it transforms its input otherwise than by a permutation.
    """
    if not isinstance(t_in, Permutation):
        raise TypeError(
            f"RPTQ.then transforms its input by {type(t_in).__name__}, but clusters of "
            "features can only be reordered; take a method that permutes at most"
        )
    return t_in.index
