"""BRECQ: AdaRound on whole blocks (Li et al., ICLR 2021; Nagel et al., ICML 2020).

https://arxiv.org/abs/2102.05426 and, for the rounding, https://arxiv.org/abs/2004.10568
(equations 22 to 25). Each weight learns whether it is rounded down or up,

    W' = s (clip(floor(W / s) + h(V) + z, 0, 2^bits - 1) - z),
    h(V) = clip(sigmoid(V) (zeta - gamma) + gamma, 0, 1),   zeta = 1.1, gamma = -0.1,

and a term that grows sharper drives `h` to 0 or 1, with `beta` falling from 20 to 2:

    lambda sum(1 - |2 h(V) - 1|^beta).

What is minimised beside it is the squared error of the block's output, summed over
features and averaged over tokens (the reference's `mse`; its Fisher weights are for
convolutional networks). `V` starts where `h` is the fraction of `W / s`; scales are
those of least squared error and stay as they are.
"""

from dataclasses import KW_ONLY, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Float32

from qjax.core.learned import in_steps, packed, spread_to, weight_of, within_codes
from qjax.core.scales import MSE, Grid, Search, scale_type
from qjax.methods.base import Solution, positive_integer, within
from qjax.methods.blockwise import BlockwiseIntegers, Trained

ZETA, GAMMA = np.float32(1.1), np.float32(-0.1)
SHARPEST, SOFTEST = np.float32(2), np.float32(20)


def share_up(v: Float32[Array, "..."]) -> Float32[Array, "..."]:
    """`h(V)`: how far each weight is rounded up."""
    return jnp.clip(jax.nn.sigmoid(v) * (ZETA - GAMMA) + GAMMA, 0, 1)


def decided(up: Float32[Array, "..."]) -> Float32[Array, "..."]:
    """Up or down."""
    return (up >= 0.5).astype(jnp.float32)


def undecided(v: Float32[Array, "..."], beta: Any) -> Float32[Array, ""]:
    """`sum(1 - |2 h(V) - 1|^beta)`."""
    # Away from 0, where the gradient of a power is not finite.
    distance = jnp.maximum(jnp.abs(2 * share_up(v) - 1), np.float32(1e-6))
    return jnp.sum(1 - distance**beta)


LEAST_ERROR = MSE()


@dataclass(frozen=True)
class BRECQ(BlockwiseIntegers):
    """BRECQ.

    Args:
      scheme: a named pair of formats; "W4A16" is the default.
      weights: an integer format, in place of a scheme.
      activations: how the input of the contraction is coded, beside `weights`; dynamic.
      search: how the range of each group is chosen; `MSE()`.
      iters: steps for each block; 20,000, as in the reference.
      batch_size: sequences of a step; 32. A calibration batch is never split.
      quantized_input: whether a block's inputs come from the quantized blocks before it
        or from the full-precision model.
      lr: of Adam; 0.001.
      rounding_weight: `lambda`, 0.01.
      warmup: share of the steps before the rounding term counts; 0.2.
      targets: patterns of the sites to take; None takes all but the head, routers and
        embeddings.
      ignore: patterns of the sites to leave.

    Raises:
        ValueError: an unknown scheme, a field out of range, formats that are no
            integers with whole zeros, or activations with a static range.
    """

    _: KW_ONLY
    search: Search = LEAST_ERROR
    iters: int = 20_000
    batch_size: int = 32
    lr: float | int = 0.001
    rounding_weight: float | int = 0.01
    warmup: float | int = 0.2

    keep_best = False
    summed = True

    def __post_init__(self):
        super().__post_init__()
        positive_integer("BRECQ", "iters", self.iters)
        within("BRECQ", "lr", self.lr, 0, 10)
        within("BRECQ", "rounding_weight", self.rounding_weight, 0, 1000)
        within("BRECQ", "warmup", self.warmup, 0, 0.99)
        if self.integers.zero == "float":
            raise ValueError(
                f"BRECQ rounds to whole codes, but {self.format.name} has zeros that "
                'are none; take zero="int"'
            )

    def init(self, w: Float[Array, "... K N"]) -> Trained:
        """Where `h(V)` is the fraction of `W / s`; the grid, which is not learned."""
        grid = self.integers.fit(w, self.search)
        steps = in_steps(w, grid.scale, self.integers)
        part = steps - jnp.floor(steps)
        start = {"v": -jnp.log((ZETA - GAMMA) / (part - GAMMA) - 1)}
        start["scale"] = grid.scale.astype(jnp.float32)
        if grid.zero is not None:
            start["zero"] = grid.zero.astype(jnp.float32)
        return start

    def _codes(self, w: Any, trained: Trained, up: Any) -> Any:
        """Codes between which nothing is rounded any more, and their grid."""
        format, fixed = self.integers, jax.lax.stop_gradient(trained)
        scale = fixed["scale"].astype(scale_type(format.scale_dtype, w))
        zero = fixed.get("zero", jnp.full_like(fixed["scale"], format.half))
        codes = jnp.floor(in_steps(w, scale, format)) + up + spread_to(zero, format, w)
        return within_codes(codes, format), scale, zero

    def fake(
        self, w: Float[Array, "... K N"], trained: Trained, progress: Any = 0
    ) -> Float[Array, "... K N"]:
        """The weight between its two codes; at the end, at one of them."""
        up = share_up(trained["v"])
        up = jnp.where(progress < 1, up, decided(up))
        codes, scale, zero = self._codes(w, trained, up)
        return weight_of(codes, scale, zero, self.integers).astype(w.dtype)

    def penalty(self, trained: Trained, progress: Any) -> Any:
        """The rounding term, after the warm-up."""
        past = (progress - self.warmup) / np.float32(1 - self.warmup)
        beta = SHARPEST + (SOFTEST - SHARPEST) * jnp.maximum(1 - past, 0)
        term = np.float32(self.rounding_weight) * undecided(trained["v"], beta)
        return jnp.where(progress < self.warmup, np.float32(0), term)

    def optimizer(self) -> optax.GradientTransformation:
        """Adam."""
        return optax.adam(self.lr)

    def finish(self, w: Float[Array, "... K N"], trained: Trained) -> Solution:
        """The coded weight, in one part."""
        up = decided(share_up(trained["v"]))
        codes, scale, zero = self._codes(w, trained, up)
        whole = None if self.integers.symmetric else zero.astype(jnp.uint8)
        return Solution((packed(codes, Grid(scale, whole), self.integers),))
