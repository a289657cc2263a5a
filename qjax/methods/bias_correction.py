"""Bias correction (Nagel et al., 2019, arXiv:1906.04721): outputs right on average.

Rounding moves the mean of a linear's outputs wherever the mean of its inputs is not
zero (section 4.2). The bias that moves it back is

    analytic:   b = E[x] (W - Q)            empirical:   b = E[x] W - E[x_q] Q

with `x[M, K]` the input that the quantized model has at the site, `x_q` the same input
as its activation format codes it, and `Q` all that stands for `W[K, N]`. For
weight-only schemes the two are equal.

Differences from the reference: `E[x]` is measured, where the paper derives it from the
statistics of batch normalization; the empirical form takes the output of the float
layer on the quantized model's input as its aim, so that each site answers for its own
error only (the paper compares whole models; `QEP` corrects the drift of inputs). A
static activation range is known only when the pass has seen every batch, so that there
`E[x]` stands in for `E[x_q]`: the rounding of a range without clipping is nearly
unbiased. The note `coded_mean` says which of the two was taken.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from qjax.core.qtensor import Activation
from qjax.core.statistics import Mean, Statistic, Sum
from qjax.methods.base import Solution, check_patterns

KINDS = ("analytic", "empirical")


def coded_mean_term(
    x: Float[Array, "M K"], weight: Float[Array, " M"], activation: Activation
) -> Float32[Array, " K"]:
    """`sum_m weight_m x_q[m]` of a batch, coded with the batch's own scales."""
    x = jnp.where(weight[:, None] > 0, x, jnp.zeros((), x.dtype))
    kept, below = jnp.zeros((), x.dtype), x
    if activation.outliers is not None:
        reaches = jnp.abs(x) >= jnp.asarray(activation.outliers, x.dtype)
        outlier = jnp.any(reaches, axis=0, keepdims=True)
        below = jnp.where(reaches, kept, x)
        x, kept = jnp.where(outlier, kept, x), jnp.where(outlier, x, kept)
    format = activation.format
    grid = format.fit(below.T)
    coded = format.from_codes(format.to_codes(x.T, grid), grid)
    return weight.astype(jnp.float32) @ (coded.T + kept.astype(jnp.float32))


@dataclass(frozen=True)
class CodedMean:
    """`E[x_q]`, `[K]`: the mean of the input as a dynamic activation format codes it.

    Args:
      activation: the format; its scales come from each batch.

    Raises:
      ValueError: the range is static.
    """

    activation: Activation

    def __post_init__(self):
        if not self.activation.dynamic:
            raise ValueError(
                f"CodedMean.activation {self.activation.format.name} is static; its "
                "scales are not known while batches are seen, take a dynamic one"
            )

    def init(self, K: int) -> Sum:
        """No tokens."""
        return Sum(jnp.zeros(K, jnp.float32), jnp.zeros((), jnp.float32))

    def update(self, state: Sum, x: Any, weight: Any, full: Any = None) -> Sum:
        """With the tokens of a batch."""
        term = coded_mean_term(x, weight, self.activation)
        count = weight.astype(jnp.float32).sum()
        return Sum(state.total + term, state.count + count)

    def merge(self, a: Sum, b: Sum) -> Sum:
        """With the tokens of both."""
        return Sum(a.total + b.total, a.count + b.count)

    def finalize(self, state: Sum) -> Float32[Array, " K"]:
        """The mean; zero without tokens."""
        return state.total / jnp.maximum(state.count, 1)


def correction(
    w: Float[Array, "K N"],
    q: Float32[Array, "K N"],
    mean: Float32[Array, " K"],
    coded: Float32[Array, " K"],
) -> Float32[Array, " N"]:
    """`E[x] W - E[x_q] Q`, as `E[x] (W - Q) + (E[x] - E[x_q]) Q`: no cancellation."""
    moved = jnp.matmul(mean, w.astype(jnp.float32) - q, precision="highest")
    return moved + jnp.matmul(mean - coded, q, precision="highest")


@dataclass(frozen=True)
class BiasCorrection:
    """A repair: the mean error of each output becomes a bias of the quantized linear.

    Linears and convolutions take it, also those without a bias of their own. Leaves
    with experts have no place for it: they stay as they are and their note
    `bias_not_applied` is 1.

    Args:
      kind: "analytic" or "empirical", see above; the second makes up for the coding of
        the input too. Of a convolution the patches are coded on their own here, whole
        images where it runs.
      activation: how the input is coded; the engine fills it in from the quantizing
        method.
      experts: whether the leaf has experts; the engine fills it in.
      targets: patterns of the sites to correct; None takes all that are quantized.
      ignore: patterns of the sites to leave.

    Raises:
        ValueError: an unknown kind.
    """

    kind: str = "analytic"
    activation: Activation | None = None
    experts: bool = False
    targets: str | tuple[str, ...] | None = None
    ignore: str | tuple[str, ...] = ()

    def __post_init__(self):
        check_patterns("BiasCorrection", self.targets, self.ignore)
        if self.kind not in KINDS:
            raise ValueError(
                f"BiasCorrection.kind must be one of {KINDS}, got {self.kind!r}"
            )

    def bind(self, method: Any, lead: tuple[int, ...]) -> "BiasCorrection":
        """The repair of one site, which knows what quantized it."""
        return replace(self, activation=method.activation, experts=bool(lead))

    @property
    def coded(self) -> bool:
        """Whether `E[x_q]` is measured."""
        activation = self.activation
        if self.kind != "empirical" or activation is None:
            return False
        return activation.dynamic

    @property
    def statistics(self) -> Mapping[str, Statistic]:
        """What to accumulate over the site's input."""
        mean: dict[str, Statistic] = {"mean": Mean()}
        if self.coded and self.activation is not None:
            mean["coded"] = CodedMean(self.activation)
        return mean

    def repair(
        self, w: Float[Array, "K N"], solution: Solution, stats: Mapping[str, Any]
    ) -> Solution:
        """The solution with its bias, on top of one that it may have."""
        if self.experts:
            notes = {**solution.notes, "bias_not_applied": jnp.float32(1)}
            return replace(solution, notes=notes)
        mean = stats["mean"]
        q = solution.decoded()
        bias = correction(w, q, mean, stats["coded"] if self.coded else mean)
        size = jnp.sqrt(jnp.mean(jnp.square(bias)))
        notes = {**solution.notes, "bias": size}
        if self.kind == "empirical" and self.activation is not None:
            notes["coded_mean"] = jnp.float32(self.coded)
        whole = bias if solution.bias is None else solution.bias + bias
        return replace(solution, bias=whole, notes=notes)
