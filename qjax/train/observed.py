"""Observed activation ranges (Jacob et al., CVPR 2018).

https://arxiv.org/abs/1712.05877, section 3.1

While training, the range of each site's input is an exponential moving average of the
smallest and largest value of each batch; activations stay in float for the first steps,
until the ranges have settled, and the ranges may be frozen later. Values outside the
range are clipped and have no gradient.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32

from qjax.core.formats import NVFP4, Float, Int
from qjax.core.granularity import Granularity
from qjax.core.qtensor import Activation
from qjax.core.ranges import check_static
from qjax.core.scales import Grid
from qjax.methods.base import within
from qjax.train.quantizers import InputQuantizer, Seen, Trained, spread_over

_EACH = Granularity(1, None)
Ranges = dict[str, Any]
"""`low`, `high` `[..., G, 1]`, and `batches` `[..., 1, 1]`, how many were seen."""


@dataclass(frozen=True)
class Observed(InputQuantizer):
    """Static activation ranges that are observed while training.

    Args:
      format: `Int` or `Float` with `tensor()` or `block(g, None)` granularity.
      momentum: of the moving average, in (0, 1); 0.99, as PyTorch's observer.
      start: steps before activations are quantized; ranges are observed from the first.
      freeze: the step from which ranges no longer move; None: never.

    Raises:
      ValueError: a field out of range, or a format without a static range.
    """

    format: Any
    momentum: float | int = 0.99
    start: int = 0
    freeze: int | None = None

    observes = True

    def __post_init__(self):
        check_static("Observed", self.format)
        if isinstance(self.format, NVFP4):
            raise ValueError("Observed.format nvfp4 has no observed range; take Int")
        within("Observed", "momentum", self.momentum, 0, 1 - 1e-9)
        for field in ("start", "freeze"):
            value = getattr(self, field)
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not (whole and value >= 0) and not (field == "freeze" and value is None):
                raise ValueError(
                    f"Observed.{field} must be a whole number >= 0, got {value!r}"
                )
        if self.freeze is not None and self.freeze < 1:
            raise ValueError("Observed.freeze is 0: no range would ever be observed")
        if self.freeze is not None and self.freeze < self.start:
            raise ValueError(
                f"Observed.freeze is {self.freeze}, before Observed.start, "
                f"{self.start}: the ranges would be out of date where they are first "
                "used"
            )

    @property
    def activation(self) -> Activation:
        """How the input is coded."""
        return Activation(self.format, dynamic=False)

    def fresh(self, lead: tuple[int, ...], blocks: int) -> Ranges:
        """Ranges of which nothing was seen."""
        empty = jnp.zeros((*lead, blocks, 1), jnp.float32)
        batches = jnp.zeros((*lead, 1, 1), jnp.int32)
        return {"low": empty, "high": empty, "batches": batches}

    def update(self, ranges: Ranges, seen: Seen, step: Any) -> Ranges:
        """The ranges after a batch."""
        first = ranges["batches"] == 0
        share = jnp.where(first, np.float32(1), np.float32(1 - self.momentum))
        moved = {
            end: ranges[end] + share * (getattr(seen, end) - ranges[end])
            for end in ("low", "high")
        }
        moved["batches"] = ranges["batches"] + 1
        if self.freeze is None:
            return moved
        return jax.tree.map(
            lambda a, b: jnp.where(step < self.freeze, a, b), moved, ranges
        )

    def live(self, ranges: Ranges, step: Any) -> Any:
        """Whether activations are quantized by now, `[..., 1, 1]`."""
        return (step >= self.start) & (ranges["batches"] > 0)

    def input_grid(self, trained: Trained) -> Grid:
        """The format's grid on the observed range, zero included."""
        assert isinstance(self.format, (Int, Float))
        low = jnp.minimum(trained["low"], 0)
        ends = jnp.concatenate([low, jnp.maximum(trained["high"], 0)], axis=-1)
        return replace(self.format, granularity=_EACH).fit(ends)

    def input_estimate(self, x: Float32[Array, "... K M"], trained: Trained) -> Any:
        """`x`, constant outside the range."""
        grid = jax.lax.stop_gradient(self.input_grid(trained))
        granularity = self.format.granularity
        low, high = (spread_over(e, granularity, x) for e in self._ends(grid))
        return jnp.where((x < low) | (x > high), jax.lax.stop_gradient(x), x)

    def _ends(self, grid: Grid) -> tuple[Any, Any]:
        """Beyond which values are clipped: half a step outside the last codes."""
        scale = grid.scale.astype(jnp.float32)
        if not isinstance(self.format, Int):
            most = scale * np.float32(self.format.element.largest)
            return -most, most
        zero = grid.zero
        zero = (
            np.float32(self.format.half) if zero is None else zero.astype(jnp.float32)
        )
        ends = (-zero - 0.5) * scale, (2**self.format.bits - zero - 0.5) * scale
        return jnp.minimum(*ends), jnp.maximum(*ends)
