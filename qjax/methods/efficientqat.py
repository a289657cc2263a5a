"""EfficientQAT: training of all parameters of a block (Chen et al., 2024, ACL 2025).

https://arxiv.org/abs/2407.11062, section 3.2 (Block-AP). Weights, scales and zero
points of a block are trained together on the mean squared error of its output:

    W' = s (clip(round(W / s) + round(z), 0, 2^bits - 1) - round(z)),

with rounding passed straight through, so that clipped weights have no gradient of their
own, and the scale that of its codes. The first phase of the paper; the second trains
the scales of all blocks end to end (`qjax.scales_of`).

Written from the paper. Learning rates fall along a cosine to a twentieth.
"""

from dataclasses import KW_ONLY, dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from qjax.core.learned import codes_of, in_steps, packed, weight_of
from qjax.core.rounding import clamp, round_ste
from qjax.core.scales import Grid, scale_type
from qjax.methods.base import Solution, within
from qjax.methods.blockwise import BlockwiseIntegers, Trained

LEAST = 1 / 20


@dataclass(frozen=True)
class EfficientQAT(BlockwiseIntegers):
    """EfficientQAT, block-wise training of all parameters.

    Args:
      scheme: a named pair of formats; "W4A16" is the default. The paper's have zero
        points: "W4A16_ASYM".
      weights: an integer format, in place of a scheme.
      activations: how the input of the contraction is coded, beside `weights`; dynamic.
      iters: steps for each block; 4096, as twice through 4096 sequences.
      batch_size: sequences of a step; 2. A calibration batch is never split.
      quantized_input: whether a block's inputs come from the quantized blocks before it
        or from the full-precision model.
      lr: of Adam on scales and zero points; 1e-4.
      weight_lr: on weights; None is 2e-5 at 2 bits and 1e-5 above.
      targets: patterns of the sites to take; None takes all but the head, routers and
        embeddings.
      ignore: patterns of the sites to leave.

    Raises:
        ValueError: an unknown scheme, a field out of range, formats that are no
            integers, or activations with a static range.
    """

    _: KW_ONLY
    iters: int = 4096
    batch_size: int = 2
    lr: float | int = 1e-4
    weight_lr: float | int | None = None

    keep_best = False

    def __post_init__(self):
        super().__post_init__()
        within("EfficientQAT", "lr", self.lr, 0, 10)
        if self.weight_lr is not None:
            within("EfficientQAT", "weight_lr", self.weight_lr, 0, 10)

    def init(self, w: Float[Array, "... K N"]) -> Trained:
        """The weights, and the grid of their ranges."""
        grid = self.integers.fit(w)
        learned = {"w": w.astype(jnp.float32), "scale": grid.scale.astype(jnp.float32)}
        if grid.zero is None:
            return learned
        return {**learned, "zero": grid.zero.astype(jnp.float32)}

    def _learned(self, w: Any, trained: Trained) -> Any:
        format = self.integers
        scale = trained["scale"].astype(scale_type(format.scale_dtype, w))
        if format.symmetric:
            zero = jnp.full_like(trained["scale"], format.half)
        elif format.zero == "int":
            zero = clamp(round_ste(trained["zero"]), 0.0, float(2**format.bits - 1))
        else:
            zero = trained["zero"].astype(scale.dtype).astype(jnp.float32)
        codes = codes_of(in_steps(trained["w"], scale, format), zero, format)
        return codes, scale, zero

    def fake(
        self, w: Float[Array, "... K N"], trained: Trained, progress: Any = 0
    ) -> Float[Array, "... K N"]:
        """The trained weight as it is quantized, straight-through."""
        codes, scale, zero = self._learned(w, trained)
        return weight_of(codes, scale, zero, self.integers).astype(w.dtype)

    def optimizer(self) -> optax.GradientTransformation:
        """Adam, with rates of their own for weights and grids."""
        own = 2e-5 if self.integers.bits <= 2 else 1e-5
        rates = {"w": own if self.weight_lr is None else self.weight_lr}
        rates["grid"] = self.lr
        falling: dict[Any, Any] = {
            name: optax.adam(optax.cosine_decay_schedule(rate, self.iters, LEAST))
            for name, rate in rates.items()
        }

        def labels(trained: list[Trained]) -> list[dict[str, str]]:
            return [{n: "w" if n == "w" else "grid" for n in t} for t in trained]

        return optax.partition(falling, labels)

    def finish(self, w: Float[Array, "... K N"], trained: Trained) -> Solution:
        """The coded weight, in one part."""
        codes, scale, zero = self._learned(w, trained)
        kinds: dict[Any, Any] = {"int": np.uint8, "float": scale.dtype}
        kept = kinds.get(self.integers.zero)
        grid = Grid(scale, None if kept is None else zero.astype(kept))
        return Solution((packed(codes, grid, self.integers),))
