"""AutoRound: signed gradient descent on rounding and ranges (Cheng et al., 2023).

https://arxiv.org/abs/2309.05516, equations 3 to 6. Each weight has an offset `V` that
may change which way it is rounded, and each group has two factors `alpha, beta` in
[0, 1] on its smallest and largest weight, of which its scale is made:

    s  = (beta max(W) - alpha min(W)) / (2^bits - 1),    z = round(-alpha min(W) / s),
    W' = s (clip(round(W / s + V) + z, 0, 2^bits - 1) - z).

All weights of a block learn together: the mean squared difference of the block's
output, on the inputs that the quantized blocks before it give, from its output in the
full-precision model. Rounding is passed straight through; a step goes by the sign of
the gradient, and its length falls linearly to zero. The parameters kept are those of
the smallest loss.

Written from the paper and checked against auto-round 0.15.1. As there, the loss is that
of a step's minibatch, nothing but the falling steps bounds `V` (to 0.5 in total), and
symmetric schemes have one scale for the full range, of the sign that gives the largest
weight the lowest code. Difference: the last token of a sequence counts like every
other.
"""

from dataclasses import KW_ONLY, dataclass, replace
from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Float32

from qjax.core.formats import Int
from qjax.core.learned import clipped_grid, codes_of, in_steps, packed, weight_of
from qjax.core.scales import Grid
from qjax.methods.base import Solution, within
from qjax.methods.blockwise import BlockwiseIntegers, Trained
from qjax.schemes import Scheme

RANGES = ("low", "high")


def learned_codes(
    w: Float[Array, "... K N"], trained: Trained, format: Int
) -> tuple[Float32[Array, "... K N"], Grid, Float32[Array, "..."]]:
    """Codes `u = clip(round(W / s + V) + z)`, the grid, and its zeros as float32."""
    grid, zero = clipped_grid(w, trained["low"], trained["high"], format)
    steps = in_steps(w, grid.scale, format) + trained["v"]
    return codes_of(steps, zero, format), grid, zero


@dataclass(frozen=True)
class AutoRound(BlockwiseIntegers):
    """AutoRound.

    Args:
      scheme: a named pair of formats; "W4A16" is the default. Symmetric weights then
        have the reference's full range, `scale_rule="signed"`.
      weights: an integer format, in place of a scheme; it is taken as it is.
      activations: how the input of the contraction is coded, beside `weights`; dynamic.
      iters: steps for each block; 200.
      batch_size: sequences of a step; 8. A calibration batch is never split: give
        batches of one sequence if each step is to draw its sequences one by one.
      quantized_input: whether a block's inputs come from the quantized blocks before it
        or from the full-precision model.
      lr: length of the first step of `V`; None is `1 / iters`, and `2 / iters` for at
        most 3 bits and at least 1000 steps, as in the reference.
      minmax_lr: length of the first step of the ranges' factors; None is `lr`.
      targets: patterns of the sites to take; None takes all but the head, routers and
        embeddings.
      ignore: patterns of the sites to leave.

    Raises:
        ValueError: an unknown scheme, a field out of range, formats that are no
            integers, or activations with a static range.
    """

    _: KW_ONLY
    lr: float | int | None = None
    minmax_lr: float | int | None = None

    def __post_init__(self):
        super().__post_init__()
        for name in ("lr", "minmax_lr"):
            if getattr(self, name) is not None:
                within("AutoRound", name, getattr(self, name), 0, 10)

    @classmethod
    def light(cls, scheme: str | None = None, **fields: Any) -> "AutoRound":
        """The reference's `light`: 50 steps, of 0.005 at first."""
        return cls(scheme, **{"iters": 50, "lr": 5e-3, **fields})

    @classmethod
    def best(cls, scheme: str | None = None, **fields: Any) -> "AutoRound":
        """The reference's `best`: 1000 steps; it calibrates with 512 sequences."""
        return cls(scheme, **{"iters": 1000, **fields})

    @property
    def formats(self) -> Scheme:
        """The pair of formats."""
        pair = super().formats
        own = pair.weights
        if self.weights is None and isinstance(own, Int) and own.symmetric:
            return replace(pair, weights=replace(own, scale_rule="signed"))
        return pair

    @property
    def step_sizes(self) -> tuple[float, float]:
        """Lengths of the first step, of `V` and of the factors."""
        long = self.iters >= 1000 and self.integers.bits <= 3
        lr = (2.0 if long else 1.0) / self.iters if self.lr is None else self.lr
        return lr, lr if self.minmax_lr is None else self.minmax_lr

    def init(self, w: Float[Array, "... K N"]) -> Trained:
        """No offsets, and the whole ranges: the weight rounded to nearest."""
        blocks = self.integers.granularity.counts(*w.shape[-2:])
        ones = jnp.ones((*w.shape[:-2], *blocks), jnp.float32)
        return {"v": jnp.zeros(w.shape, jnp.float32), "low": ones, "high": ones}

    def fake(
        self, w: Float[Array, "... K N"], trained: Trained, progress: Any = 0
    ) -> Float[Array, "... K N"]:
        """The weight as it is quantized, straight-through."""
        codes, grid, zero = learned_codes(w, trained, self.integers)
        return weight_of(codes, grid.scale, zero, self.integers).astype(w.dtype)

    def optimizer(self) -> optax.GradientTransformation:
        """Steps by the sign of the gradient, shorter and shorter."""
        rounding, ranges = (
            optax.sign_sgd(optax.linear_schedule(lr, 0.0, self.iters))
            for lr in self.step_sizes
        )

        def labels(trained: list[Trained]) -> list[dict[str, str]]:
            return [{n: "range" if n in RANGES else "v" for n in t} for t in trained]

        return optax.partition({"v": rounding, "range": ranges}, labels)

    def project(self, trained: Trained) -> Trained:
        """With the factors in [0, 1]."""
        kept = {name: jnp.clip(trained[name], 0, 1) for name in RANGES}
        return {**trained, **kept}

    def finish(self, w: Float[Array, "... K N"], trained: Trained) -> Solution:
        """The coded weight, in one part."""
        codes, grid, _ = learned_codes(w, trained, self.integers)
        return Solution((packed(codes, grid, self.integers),))
