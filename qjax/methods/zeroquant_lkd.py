"""Layer-by-layer knowledge distillation of ZeroQuant (Yao et al., 2022).

https://arxiv.org/abs/2206.01861, section 4.3. One block after the other is trained to
give, in low bits, what the full-precision block gives:

    min over W of  |L(x; W) - L(x; Q(W))|^2,

on the inputs `x` that the full-precision model has there. `Q` rounds to nearest with
the range that the trained weights have, and rounding is passed straight through.
"""

from dataclasses import KW_ONLY, dataclass
from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from qjax.core.coded import encode, fake_quantize
from qjax.core.scales import MINMAX, Search
from qjax.core.sweep import side_by_side
from qjax.methods.base import Solution, within
from qjax.methods.blockwise import Blockwise, Trained


@dataclass(frozen=True)
class ZeroQuantLKD(Blockwise):
    """ZeroQuant's layer-by-layer distillation, for any weight format.

    Args:
      scheme: a named pair of formats; "W4A16" is the default.
      weights: a weight format, in place of a scheme.
      activations: how the input of the contraction is coded, beside `weights`; dynamic.
      search: how the range of each group is chosen; `MinMax()`.
      iters: steps for each block; 100.
      batch_size: sequences of a step; 32. A calibration batch is never split.
      quantized_input: whether a block's inputs come from the quantized blocks before it
        or, as in the paper, from the full-precision model; False.
      lr: of Adam; 5e-6.
      targets: patterns of the sites to take; None takes all but the head, routers and
        embeddings.
      ignore: patterns of the sites to leave.

    Raises:
        ValueError: an unknown scheme, a field out of range, or activations with a
            static range.
    """

    _: KW_ONLY
    search: Search = MINMAX
    iters: int = 100
    batch_size: int = 32
    quantized_input: bool = False
    lr: float | int = 5e-6

    keep_best = False

    def __post_init__(self):
        super().__post_init__()
        within("ZeroQuantLKD", "lr", self.lr, 0, 10)

    @property
    def shared(self) -> bool:
        """Whether columns are independent, but for a second scale."""
        return side_by_side(self.format)

    def init(self, w: Float[Array, "... K N"]) -> Trained:
        """The weights."""
        return {"w": w.astype(jnp.float32)}

    def fake(
        self, w: Float[Array, "... K N"], trained: Trained, progress: Any = 0
    ) -> Float[Array, "... K N"]:
        """The trained weight as it is quantized, straight-through."""
        own = trained["w"].astype(w.dtype)
        return fake_quantize(own, self.format, search=self.search)

    def optimizer(self) -> optax.GradientTransformation:
        """Adam."""
        return optax.adam(self.lr)

    def finish(self, w: Float[Array, "... K N"], trained: Trained) -> Solution:
        """The coded weight, in one part."""
        own = trained["w"].astype(w.dtype)
        return Solution((encode(own, self.format, search=self.search),))
