"""SmoothQuant (Xiao et al., 2023, arXiv:2211.10438): outliers moved into the weights.

`Y = (X diag(s)^-1) (diag(s) W)`, equation 4, with
`s_j = max|X_j|^a / max|W_j|^(1-a)`: the larger `a`, the more of the difficulty moves
from activations to weights. The inverse is folded into the gain of the norm that makes
`X`, so that nothing runs more. The scale is the reference implementation's, floors
included; llm-compressor takes the width of the activation's range (max - min) and twice
the largest weight in place of the largest magnitudes (`span=True`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from qjax.core.statistics import Range, Statistic
from qjax.methods.base import Choice, Group, check_patterns

FLOOR = 1e-5  # of both maxima and of the scale, as in the reference implementation


def smoothing_scale(
    x: Float32[Array, " K"], w: Float32[Array, " K"], strength: float
) -> Float32[Array, " K"]:
    """`s[K]` from the size of each input feature and of its weights."""
    w = jnp.maximum(w, FLOOR)
    return jnp.maximum(x**strength / w ** (1 - strength), FLOOR)


def feature_sizes(
    ws: Sequence[Float[Array, "K _"]], span: bool
) -> Float32[Array, " K"]:
    """The size of the weights of each input feature, over all sites that read it."""
    exact = [w.astype(jnp.float32) for w in ws]
    largest = jnp.stack([jnp.abs(w).max(-1) for w in exact]).max(0)
    if not span:
        return largest
    return 2 * largest


@dataclass(frozen=True)
class SmoothQuant:
    """A transform: a quantizer must follow, such as `GPTQ("W8A8")`.

    Args:
      smoothing_strength: `a`, 0 to 1. Default 0.5 (the paper); llm-compressor's recipes
        use 0.8, the paper 0.85 for Llama 2 7B.
      span: measure widths of ranges in place of largest magnitudes, as llm-compressor.
      online: where no norm takes the scale, divide the activation at run time; without
        it such a mapping is left out and reported.
      targets: patterns of the sites to smooth; None takes all that are quantized and
        whose input comes from a norm.
      ignore: patterns of the sites to leave.

    Raises:
        ValueError: `smoothing_strength` is not in [0, 1].
    """

    smoothing_strength: float = 0.5
    span: bool = False
    online: bool = False
    targets: str | tuple[str, ...] | None = None
    ignore: str | tuple[str, ...] = ()

    norms_only = True

    def __post_init__(self):
        check_patterns("SmoothQuant", self.targets, self.ignore)
        strength = self.smoothing_strength
        if not isinstance(strength, (int, float)) or not 0 <= strength <= 1:
            raise ValueError(
                f"SmoothQuant.smoothing_strength must be in [0, 1], got {strength!r}"
            )

    @property
    def statistics(self) -> Mapping[str, Statistic]:
        """What to accumulate over the input of the sites."""
        return {"range": Range()}

    def transform(self, group: Group) -> Choice:
        """The scale of one group of sites that read the same activation."""
        low, high = group.stats["range"].low, group.stats["range"].high
        x = high - low if self.span else jnp.maximum(-low, high)
        w = feature_sizes(group.ws, self.span)
        return Choice(group.tied(smoothing_scale(x, w, self.smoothing_strength)))
