"""XNOR-Net's binary weights (Rastegari et al., ECCV 2016).

https://arxiv.org/abs/1603.05279

    w_hat = alpha sign(w),   alpha = mean|w| of each output feature     (eqs. 3 to 6)
    dC/dw = dC/dw_hat (1/n + alpha 1[|w| <= 1])                         (section 3.1)

with `n` weights for each alpha. Binary activations are not part of it: a site's input
has its own quantizer.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32

from qjax.core.formats import Binary, channel
from qjax.core.granularity import Granularity, block_sizes, spread
from qjax.core.rounding import clamp
from qjax.core.scales import Grid
from qjax.train.quantizers import (
    Trained,
    WeightQuantizer,
    check_granularity,
    spread_over,
)

_CHANNEL = channel()


@dataclass(frozen=True)
class XNOR(WeightQuantizer):
    """Signs times the mean magnitude.

    Args:
      granularity: which weights share a scale; `channel()`, as in the paper.

    Raises:
      ValueError: `granularity` is none.
    """

    granularity: Granularity = _CHANNEL

    def __post_init__(self):
        check_granularity("XNOR", self.granularity)

    @property
    def weight_format(self) -> Binary:
        """How the weights are stored."""
        return Binary(self.granularity, scale_dtype="float32")

    def weight_grid(self, w: Any, trained: Trained) -> tuple[Any, Grid]:
        """Signs and mean magnitudes."""
        return w, self.weight_format.fit(w)

    def weight_estimate(self, w: Float32[Array, "... K N"], trained: Trained) -> Any:
        """`w / n + alpha clip(w, -1, 1)`, which has the paper's gradient."""
        K, N = w.shape[-2:]
        count = block_sizes(self.granularity, K, N).astype(np.float32)
        n = spread(jnp.asarray(count), self.granularity, K, N)
        held = jax.lax.stop_gradient(self.weight_format.fit(w).scale)
        alpha = spread_over(held, self.granularity, w)
        return w / n + alpha * clamp(w, np.float32(-1), np.float32(1))
