"""OmniQuant: learned clipping and learned scales (Shao et al., 2023, ICLR 2024).

https://arxiv.org/abs/2308.13137, equation 2. The range of each group is multiplied by
two learned numbers in (0, 1),

    s = (sigmoid(gamma) max(W) - sigmoid(beta) min(W)) / (2^bits - 1),
    z = round(-sigmoid(beta) min(W) / s),

and where activations are coded too, their outliers move into the weights by a learned
scale of each input feature (equation 3),

    x W = (x diag(s)^-1) (diag(s) W)  ~  q(x diag(s)^-1) q(diag(s) W).

All sites of a block learn together, on the mean squared error of its output. For
weights alone the paper learns clipping only, as here.

Differences: each site has scales of its own, which divide its input where it runs,
where the reference shares them among the readers of a norm and folds them into it;
they start at 1, or where `SmoothQuant` before it left them; there are no shifts (the
paper has none for LLaMA) and no scales between queries and keys. The reference goes
through 128 sequences 20 times (40 at 2 bits), one at a time and in order; here they are
drawn.
"""

from dataclasses import KW_ONLY, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from qjax.core.learned import clipped_grid, codes_of, in_steps, packed, weight_of
from qjax.core.transforms import Diagonal
from qjax.methods.base import Solution, within
from qjax.methods.blockwise import BlockwiseIntegers, Trained

START = 4.0


@dataclass(frozen=True)
class OmniQuant(BlockwiseIntegers):
    """OmniQuant: learned weight clipping, and a learned equivalent transformation.

    Args:
      scheme: a named pair of formats; "W4A16" is the default.
      weights: an integer format, in place of a scheme.
      activations: how the input of the contraction is coded, beside `weights`; dynamic.
      iters: steps for each block; 2560, as 20 times through 128 sequences.
      batch_size: sequences of a step; 1. A calibration batch is never split.
      quantized_input: whether a block's inputs come from the quantized blocks before it
        or from the full-precision model.
      lr: of AdamW, for clipping; 0.01 (`lwc_lr`).
      let: whether scales of the input are learned; None: where it is coded.
      let_lr: of AdamW, for the logarithms of these scales; 0.005.
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
    let: bool | None = None
    let_lr: float | int = 0.005

    keep_best = False

    def __post_init__(self):
        super().__post_init__()
        within("OmniQuant", "lr", self.lr, 0, 10)
        within("OmniQuant", "let_lr", self.let_lr, 0, 10)

    @property
    def moves(self) -> bool:
        """Whether scales of the input are learned."""
        return self.activation is not None if self.let is None else self.let

    def init(self, w: Float[Array, "... K N"]) -> Trained:
        """Logits of 4: ranges of 98 %; scales of 1."""
        blocks = self.integers.granularity.counts(*w.shape[-2:])
        logits = jnp.full((*w.shape[:-2], *blocks), START, jnp.float32)
        learned = {"low": logits, "high": logits}
        scales = jnp.zeros(w.shape[:-1], jnp.float32)
        return {**learned, "scale": scales} if self.moves else learned

    def _learned(self, w: Any, trained: Trained) -> Any:
        if self.moves:
            w = (w * jnp.exp(trained["scale"])[..., None]).astype(w.dtype)
        low, high = (jax.nn.sigmoid(trained[name]) for name in ("low", "high"))
        grid, zero = clipped_grid(w, low, high, self.integers)
        zero = jax.lax.stop_gradient(zero)  # as in the reference
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
        rates: dict[Any, Any] = {
            "clip": optax.adam(self.lr),
            "scale": optax.adam(self.let_lr),
        }

        def labels(trained: list[Trained]) -> list[dict[str, str]]:
            return [{n: n if n == "scale" else "clip" for n in t} for t in trained]

        return optax.partition(rates, labels)

    def moved(self, trained: Trained) -> Any:
        """`diag(s)^-1`, where it is learned."""
        return Diagonal(jnp.exp(-trained["scale"])) if self.moves else None

    def finish(self, w: Float[Array, "... K N"], trained: Trained) -> Solution:
        """The coded weight, in one part."""
        codes, grid, _ = self._learned(w, trained)
        return Solution((packed(codes, grid, self.integers),), t_in=self.moved(trained))
