"""OmniQuant: learned clipping of weights (Shao et al., 2023, ICLR 2024).

https://arxiv.org/abs/2308.13137, equation 2. The range of each group is multiplied by
two learned numbers in (0, 1),

    s = (sigmoid(gamma) max(W) - sigmoid(beta) min(W)) / (2^bits - 1),
    z = round(-sigmoid(beta) min(W) / s),

which all sites of a block learn together, on the mean squared error of its output.

Learned weight clipping alone, as the paper has it for weight-only quantization of
LLaMA: the learned equivalent transformation, which moves outliers of activations into
weights, is not part of it. The reference goes through 128 sequences 20 times (40 at 2
bits), one at a time and in order; here they are drawn.
"""

from dataclasses import KW_ONLY, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from qjax.core.learned import clipped_grid, codes_of, in_steps, packed, weight_of
from qjax.methods.base import Solution, within
from qjax.methods.blockwise import BlockwiseIntegers, Trained

START = 4.0


@dataclass(frozen=True)
class OmniQuant(BlockwiseIntegers):
    """OmniQuant, learned weight clipping.

    Args:
      scheme: a named pair of formats; "W4A16" is the default.
      weights: an integer format, in place of a scheme.
      activations: how the input of the contraction is coded, beside `weights`; dynamic.
      iters: steps for each block; 2560, as 20 times through 128 sequences.
      batch_size: sequences of a step; 1. A calibration batch is never split.
      quantized_input: whether a block's inputs come from the quantized blocks before it
        or from the full-precision model.
      lr: of AdamW; 0.01 (`lwc_lr`).
      targets: patterns of the sites to take; None takes all but the head, routers and
        embeddings.
      ignore: patterns of the sites to leave.

    Raises:
        ValueError: an unknown scheme, a field out of range, formats that are no
            integers, or activations with a static range.
    """

    _: KW_ONLY
    iters: int = 2560
    batch_size: int = 1
    lr: float | int = 0.01

    keep_best = False

    def __post_init__(self):
        super().__post_init__()
        within("OmniQuant", "lr", self.lr, 0, 10)

    def init(self, w: Float[Array, "... K N"]) -> Trained:
        """Logits of 4: ranges of 98 %."""
        blocks = self.integers.granularity.counts(*w.shape[-2:])
        logits = jnp.full((*w.shape[:-2], *blocks), START, jnp.float32)
        return {"low": logits, "high": logits}

    def _learned(self, w: Any, trained: Trained) -> Any:
        low, high = (jax.nn.sigmoid(trained[name]) for name in ("low", "high"))
        grid, zero = clipped_grid(w, low, high, self.integers)
        steps = in_steps(w, grid.scale, self.integers)
        return codes_of(steps, zero, self.integers), grid, zero

    def fake(
        self, w: Float[Array, "... K N"], trained: Trained, progress: Any = 0
    ) -> Float[Array, "... K N"]:
        """The weight as it is quantized, straight-through."""
        codes, grid, zero = self._learned(w, trained)
        return weight_of(codes, grid.scale, zero, self.integers).astype(w.dtype)

    def optimizer(self) -> optax.GradientTransformation:
        """AdamW without decay, as in the reference."""
        return optax.adam(self.lr)

    def finish(self, w: Float[Array, "... K N"], trained: Trained) -> Solution:
        """The coded weight, in one part."""
        codes, grid, _ = self._learned(w, trained)
        return Solution((packed(codes, grid, self.integers),))
