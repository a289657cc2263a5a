"""Cross-layer equalization (Nagel et al., 2019, arXiv:1906.04721): equal ranges.

Between two linears with nothing but positive homogeneous functions in between, channel
`i` may be divided by `s_i` in the first and multiplied in the second. With `r1_i` the
range of the first's outputs' weights and `r2_i` that of the second's inputs',

    s_i = sqrt(r1_i r2_i) / r2_i                                         (section 4.1)

leaves both with the range `sqrt(r1_i r2_i)`, so that one scale for the whole matrix
serves every channel.

Differences from the reference: pairs are found in the traced program, wherever the
scale can be folded into the columns of a linear (`max(x, 0)`, added biases, products
with a gate, attention values), and each is equalized once, in the program's order,
where the paper goes round until nothing changes; a channel without weights on one side
is left alone; high biases are not absorbed, which needs batch normalization.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from qjax.core.statistics import Statistic
from qjax.methods.base import Choice, Group, check_patterns


def equalizing_scale(
    before: Float32[Array, " K"], after: Float32[Array, " K"]
) -> Float32[Array, " K"]:
    """`s[K] = sqrt(r1 / r2)`, what channels are divided by; 1 where a range is 0."""
    usable = (before > 0) & (after > 0)
    ratio = jnp.where(usable, before, 1) / jnp.where(usable, after, 1)
    return jnp.sqrt(ratio)


def ranges(
    producer: Float[Array, "K_before K"], ws: Sequence[Float[Array, "K _"]]
) -> tuple[Float32[Array, " K"], Float32[Array, " K"]]:
    """`r1[K]` of the linear before and `r2[K]` over all sites that read it."""
    before = jnp.abs(producer.astype(jnp.float32)).max(0)
    after = jnp.stack([jnp.abs(w.astype(jnp.float32)).max(-1) for w in ws]).max(0)
    return before, after


@dataclass(frozen=True)
class CrossLayerEqualization:
    """A transform: a quantizer must follow, such as `RTN(weights=Int(8, tensor()))`.

    It looks at weights only; calibration data is run through the model all the same. Of
    features that share a channel (grouped-query attention) the scales are averaged.

    Args:
      targets: patterns of the sites whose inputs are equalized; None takes all that are
        quantized. Sites whose input no linear makes are left out and reported.
      ignore: patterns of the sites to leave.
    """

    targets: str | tuple[str, ...] | None = None
    ignore: str | tuple[str, ...] = ()

    norms_only = False
    online = False

    def __post_init__(self):
        check_patterns("CrossLayerEqualization", self.targets, self.ignore)

    @property
    def statistics(self) -> Mapping[str, Statistic]:
        """Nothing: weights are enough."""
        return {}

    def transform(self, group: Group) -> Choice:
        """The scale of one group of sites that read the same activation."""
        if group.producer is None:
            return Choice(None, remark="its input is made by a norm, not by a linear")
        before, after = ranges(group.producer, group.ws)
        scale = group.tied(equalizing_scale(before, after))
        spread = before.max() / jnp.maximum(before.min(), jnp.finfo(jnp.float32).tiny)
        return Choice(scale, notes={"spread": float(spread)})
