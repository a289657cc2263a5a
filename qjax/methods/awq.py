"""AWQ (Lin et al., 2023, arXiv:2306.00978): activation-aware scales before rounding.

Scaling up the weights of features with large activations lowers their relative rounding
error: `Q(W diag(s)) diag(s)^-1 X` (equation 4). One number decides: `s = E|X|^r`, or
with `duo_scaling` `s = E|X|^r / (mean|W|^(1-r) + 1e-4)`; `r` is searched on a grid for
the least squared error of the output of the module around the sites. Scale, grid and
normalisation are those of AutoAWQ and llm-compressor. Two things differ: a scale whose
measured error is not below that of plain rounding is rejected and reported, and a scale
is folded wherever the traced program proves it possible, grouped-query attention
included.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from qjax.core.coded import fake_quantize
from qjax.core.formats import Format
from qjax.core.granularity import to_blocks
from qjax.core.statistics import Hessian, MeanAbs, Statistic
from qjax.methods.base import Choice, Group, check_patterns, positive_integer
from qjax.schemes import Scheme, scheme


def weight_sizes(
    ws: Sequence[Float[Array, "K _"]], rows: int | None
) -> Float32[Array, " K"]:
    """`E|w| / absmax of its group`, over the columns of all sites."""

    def one(w: Any) -> Any:
        exact = jnp.abs(w.astype(jnp.float32))
        K, size = w.shape[0], rows or w.shape[0]
        short = -K % size
        blocks = jnp.pad(exact, ((0, short), (0, 0))).reshape(-1, size, w.shape[1])
        scaled = blocks / (blocks.max(1, keepdims=True) + 1e-6)
        return scaled.reshape(-1, w.shape[1])[:K]

    return jnp.concatenate([one(w) for w in ws], axis=-1).mean(-1)


def scale_of(
    ratio: Float32[Array, ""],
    duo: Any,
    x: Float32[Array, " K"],
    w: Float32[Array, " K"],
) -> Float32[Array, " K"]:
    """`s[K]` of one grid point, of geometric mean range 1."""
    plain = jnp.maximum(x**ratio, 1e-4)
    both = jnp.maximum(x**ratio / (w ** (1 - ratio) + 1e-4), 1e-4)
    s = jnp.where(duo, both, plain)
    s = s / jnp.sqrt(s.max() * s.min())
    return jnp.where(jnp.isfinite(s), s, 1)


def grid_points(n_grid: int, duo_scaling: Any) -> tuple[np.ndarray, np.ndarray]:
    """Ratios `r` and whether each is with `duo` scaling, as llm-compressor has them.

    Plain scaling starts at `r = 0`, no scaling at all. With duo scaling one of the
    points is given to no scaling; "both" gives half of the points to each form.
    """
    if duo_scaling == "both":
        half = max(n_grid // 2, 1)
        ratios = np.repeat(np.linspace(0, 1, half, dtype=np.float32), 2)
        return ratios, np.arange(2 * half) % 2 == 1
    if duo_scaling:
        ratios = np.linspace(0, 1, max(n_grid - 1, 1), dtype=np.float32)
        return np.append(np.float32(0), ratios), np.arange(len(ratios) + 1) > 0
    return np.linspace(0, 1, n_grid, dtype=np.float32), np.zeros(n_grid, bool)


def clip_limits(
    w: Float[Array, "K N"],
    h: Float32[Array, "K K"],
    format: Format,
    steps: int,
    shrink: float,
) -> Float32[Array, "G N"]:
    """Largest magnitude of each group and column that leaves the least error there.

    Candidates are `(1 - i/steps) max|w|` for `i < shrink * steps`; the error of a group
    is `d^T H_g d` with the group's block of `H`.
    """
    K, N = w.shape
    size = format.granularity.rows or K
    exact = w.astype(jnp.float32)
    short = -K % size
    padded = jnp.pad(h, ((0, short), (0, short))).reshape(
        (K + short) // size, size, (K + short) // size, size
    )
    count = padded.shape[0]
    own = padded[jnp.arange(count), :, jnp.arange(count), :]
    most = jnp.abs(to_blocks(exact, format.granularity)).max((-3, -1))

    def spread(values: Any) -> Any:
        return jnp.repeat(values, size, axis=0)[:K]

    best = jnp.full(most.shape, jnp.inf)
    factor = jnp.ones(most.shape)
    for i in range(int(shrink * steps)):
        limit = spread(most * np.float32(1 - i / steps))
        rounded = fake_quantize(jnp.clip(exact, -limit, limit), format)
        delta = jnp.pad(exact - rounded, ((0, short), (0, 0))).reshape(count, size, N)
        error = jnp.einsum("gkn,gkl,gln->gn", delta, own, delta, precision="highest")
        better = error < best
        best = jnp.where(better, error, best)
        factor = jnp.where(better, np.float32(1 - i / steps), factor)
    return most * factor


@dataclass(frozen=True)
class AWQ:
    """A transform; `AWQ(scheme=...)` is short for `(AWQ(), RTN(scheme=...))`.

    Args:
      scheme: formats of the `RTN` that follows; None where another quantizer does.
      weights: a weight format, in place of a scheme.
      n_grid: points of the search. Default 20 (the paper).
      duo_scaling: whether the weights' sizes count too: True (llm-compressor's and
        AutoAWQ's default), False (the paper), or "both": half of the grid for each.
      clip: also search a clipping range per group (the paper's second step; sites whose
        name contains one of `clip_ignore` are left alone).
      clip_ignore: default q and k projections, as in the reference implementation.
      objective: "module", the output of the smallest module that holds the sites (the
        paper), or "site", the sites' own outputs.
      online: where nothing takes the scale, divide the activation at run time; without
        it such a mapping is left out and reported.
      targets: patterns of the sites; None takes all that are quantized.
      ignore: patterns of the sites to leave.

    Raises:
        ValueError: a field is out of its range.
    """

    scheme: str | None = None
    weights: Format | None = None
    n_grid: int = 20
    duo_scaling: bool | str = True
    clip: bool = False
    clip_ignore: tuple[str, ...] = ("q_proj", "k_proj")
    objective: str = "module"
    online: bool = False
    targets: str | tuple[str, ...] | None = None
    ignore: str | tuple[str, ...] = ()

    norms_only = False

    def __post_init__(self):
        check_patterns("AWQ", self.targets, self.ignore)
        positive_integer("AWQ", "n_grid", self.n_grid)
        if self.duo_scaling not in (True, False, "both"):
            raise ValueError(
                f'AWQ.duo_scaling must be True, False or "both", got '
                f"{self.duo_scaling!r}"
            )
        if self.objective not in ("module", "site"):
            raise ValueError(
                f'AWQ.objective must be "module" or "site", got {self.objective!r}'
            )
        if self.scheme is not None or self.weights is not None:
            self.quantizer()

    def quantizer(self) -> Scheme | None:
        """The formats of the `RTN` that follows, if this step names it.

        Raises:
            ValueError: an unknown scheme, or a scheme beside a format.
        """
        if self.scheme is not None and self.weights is not None:
            raise ValueError(
                f"AWQ.scheme {self.scheme!r} already says the formats; "
                "leave out weights"
            )
        if self.weights is not None:
            return Scheme(self.weights)
        return None if self.scheme is None else scheme(self.scheme)

    @property
    def statistics(self) -> Mapping[str, Statistic]:
        """What to accumulate over the input of the sites."""
        needed: dict[str, Statistic] = {"size": MeanAbs()}
        if self.clip:
            needed["hessian"] = Hessian()
        return needed

    def transform(self, group: Group) -> Choice:
        """The scale of one group of sites that read the same activation."""
        rows = group.formats[0].granularity.rows
        x = group.tied(group.stats["size"])
        w = group.tied(weight_sizes(group.ws, rows))
        ratios, duo = grid_points(self.n_grid, self.duo_scaling)
        scales = jnp.stack(
            [group.tied(scale_of(jnp.float32(r), d, x, w)) for r, d in zip(ratios, duo)]
        )
        candidates = jnp.concatenate([jnp.ones_like(scales[:1]), scales])
        errors = np.asarray(group.errors(candidates, self.objective == "module"))
        plain, found = errors[0], errors[1:]
        best = int(np.nanargmin(found)) if np.isfinite(found).any() else 0
        notes = {"ratio": float(ratios[best]), "duo": bool(duo[best])}
        accepted = bool(found[best] < plain)
        return Choice(
            scales[best] if accepted else None,
            float(plain),
            float(found[best]),
            notes,
            "" if accepted else "rejected: the error did not fall",
        )

    def limits(
        self, name: str, w: Any, stats: Mapping[str, Any], format: Format, scale: Any
    ) -> Any:
        """Clipping limits `[G, N]` of the scaled weights; None leaves them.

        `scale[K]` is what the input was divided by.
        """
        if any(part in name for part in self.clip_ignore):
            return None
        h = stats["hessian"] / (scale[:, None] * scale[None, :])
        return clip_limits(w, h, format, 20, 0.5)
