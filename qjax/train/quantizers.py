"""What quantization-aware training needs of a method, and what methods share.

A method rounds in the forward pass exactly as the finished model will: the value is
what the codes on its grid decode to. Its estimate is a differentiable expression, whose
gradient stands for that of the value.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from qjax.core.coded import Coded, pack_codes
from qjax.core.double_quant import double_quantize
from qjax.core.formats import Codebook, Format
from qjax.core.granularity import Granularity, block_sizes, spread, to_blocks
from qjax.core.pytrees import register
from qjax.core.qtensor import Activation, SiteActs
from qjax.core.rounding import straight_through
from qjax.core.scales import Grid
from qjax.ops.activations import code_input

Trained = dict[str, Any]
"""What a method learns for one leaf or one site, by name."""
LEAST_STEP = np.finfo(np.float32).eps


@dataclass(frozen=True, eq=False)
class Seen:
    """What one call saw of a site's input, for each block of features: `[..., G, 1]`.

    Attributes:
      low, high: the smallest and the largest value.
      magnitude: sum of `|x|`.
      count: how many values.
    """

    low: Any
    high: Any
    magnitude: Any
    count: Any

    def over_steps(self) -> "Seen":
        """Of all steps of a loop, which are the first axis."""
        return Seen(
            self.low.min(0),
            self.high.max(0),
            self.magnitude.sum(0),
            self.count.sum(0),
        )

    def merge(self, other: "Seen") -> "Seen":
        """Of both calls."""
        return jax.tree.map(lambda *x: jnp.stack(x), self, other).over_steps()


register(Seen, ("low", "high", "magnitude", "count"))


def see(x: Float[Array, "... K M"], granularity: Granularity) -> Seen:
    """What there is to see of an input `x.T`."""
    x = jax.lax.stop_gradient(x).astype(jnp.float32)
    blocks = to_blocks(x, granularity)
    sizes = block_sizes(granularity, *x.shape[-2:]).astype(np.float32)
    magnitude = jnp.abs(blocks).sum((-3, -1))
    return Seen(
        blocks.min((-3, -1)),
        blocks.max((-3, -1)),
        magnitude,
        jnp.broadcast_to(sizes, magnitude.shape),
    )


class WeightQuantizer(ABC):
    """A method for weights `w[..., K, N]`: a frozen, hashable dataclass."""

    rounding = "nearest"

    @property
    @abstractmethod
    def weight_format(self) -> Format:
        """How the finished weights are stored."""

    @abstractmethod
    def weight_grid(self, w: Float32[Array, "... K N"], trained: Trained) -> Any:
        """What is coded, `[..., K, N]`, and the grid on which it is."""

    @abstractmethod
    def weight_estimate(self, w: Float32[Array, "... K N"], trained: Trained) -> Any:
        """`[..., K, N]`, the expression whose gradient is the method's."""

    def shared(self, w: Float32[Array, "... K N"]) -> Trained:
        """What matrices with one input have in common, `[..., 1, 1]` each.

        The largest over these matrices stands beside what each of them learns.
        """
        return {}

    def init_weights(self, w: Float[Array, "... K N"]) -> Trained:
        """What is learned, before training; `[..., Gk, Gn]` each."""
        return {}


class InputQuantizer(ABC):
    """A method for a site's input, seen as `x.T[..., K, M]`.

    Attributes:
      learns: whether `init_inputs` needs to have seen the input.
      observes: whether ranges are observed while training (`Observed`).
    """

    learns = False
    observes = False

    @property
    @abstractmethod
    def activation(self) -> Activation:
        """How the finished model codes the input."""

    @abstractmethod
    def input_grid(self, trained: Trained) -> Grid | None:
        """The static grid, `[..., G, 1]`; None if each batch has its own."""

    @abstractmethod
    def input_estimate(self, x: Float32[Array, "... K M"], trained: Trained) -> Any:
        """`[..., K, M]`, the expression whose gradient is the method's."""

    def init_inputs(self, seen: Seen | None, lead: tuple[int, ...]) -> Trained:
        """What is learned, before training; leading axes `lead` in front."""
        return {}


def fake_weights(
    method: WeightQuantizer,
    w: Float[Array, "... K N"],
    trained: Trained,
    dtype: Any,
    key: Any = None,
) -> Float[Array, "... K N"]:
    """The weights as they will be stored, with the method's gradient.

    `key` is for stochastic rounding; without one every method rounds to nearest.
    """
    held, constants = jax.lax.stop_gradient((w, trained))
    format = method.weight_format
    v, grid = method.weight_grid(held.astype(jnp.float32), constants)
    rounding = "nearest" if key is None else method.rounding
    codes = format.to_codes(v, grid, rounding, key)
    value = format.from_codes(codes, _as_stored(grid, format))
    estimate = method.weight_estimate(w.astype(jnp.float32), trained)
    return straight_through(estimate.astype(dtype), value.astype(dtype))


def _as_stored(grid: Grid, format: Format) -> Grid:
    if not isinstance(format, Codebook) or not format.double_quant:
        return grid
    scale = double_quantize(grid.scale, format.double_quant).decode()
    return replace(grid, scale=scale)


def stored_weights(
    method: WeightQuantizer, w: Float[Array, "... K N"], trained: Trained
) -> Coded:
    """The finished weights."""
    format = method.weight_format
    v, grid = method.weight_grid(w.astype(jnp.float32), trained)
    return pack_codes(format.to_codes(v, grid), grid, format, w.shape[-2:])


def site_acts(method: InputQuantizer, trained: Trained) -> SiteActs:
    """The record of a site whose input is coded so."""
    grid = method.input_grid(trained)
    if grid is None:
        return SiteActs(activation=method.activation)
    return SiteActs(grid.scale, grid.zero, activation=method.activation)


def fake_input(
    method: InputQuantizer, x: Float[Array, "... M K"], trained: Trained
) -> Float[Array, "... M K"]:
    """The input as it will be coded, with the method's gradient."""
    held, constants = jax.lax.stop_gradient((x, trained))
    value = code_input(held, site_acts(method, constants)).decode(x.dtype)
    transposed = jnp.swapaxes(x, -1, -2).astype(jnp.float32)
    estimate = method.input_estimate(transposed, trained)
    return straight_through(jnp.swapaxes(estimate, -1, -2).astype(x.dtype), value)


def scale_gradient(x: Float[Array, "..."], factor: Any) -> Float[Array, "..."]:
    """`x`, with its gradient multiplied by a factor."""
    return straight_through(x * jnp.asarray(factor, x.dtype), x)


def positive(step: Float32[Array, "..."]) -> Float32[Array, "..."]:
    """`max(|step|, 2^-23)`: a learned step may be zero, or be driven below it.

    Brevitas takes the magnitude, whose gradient at zero it sets to 1
    (`abs_binary_sign_grad`), PyTorch's `_LearnableFakeQuantize` the same floor, which
    passes the gradient on: a step that starts at zero, of weights that do, is trained.
    """
    size = jnp.where(step < 0, -step, step)
    return straight_through(size, jnp.maximum(size, LEAST_STEP))


def spread_over(values: Any, granularity: Granularity, w: Any) -> Any:
    """Each block's value for each of its weights."""
    return spread(values, granularity, *w.shape[-2:])


def block_mean(values: Any, granularity: Granularity) -> Any:
    """Mean over each block of `[..., K, N]`, `[..., Gk, Gn]`."""
    sizes = block_sizes(granularity, *values.shape[-2:]).astype(np.float32)
    return to_blocks(values, granularity).sum((-3, -1)) / sizes


def check_bits(owner: str, bits: Any, low: int, high: int) -> None:
    """Refuse what is not a whole number of bits in a range.

    Raises:
      ValueError: naming the owner, the value and the range.
    """
    whole = isinstance(bits, int) and not isinstance(bits, bool)
    if not whole or not low <= bits <= high:
        raise ValueError(
            f"{owner}.bits must be a whole number from {low} to {high}, got {bits!r}"
        )


def check_granularity(owner: str, granularity: Any) -> None:
    """Refuse what does not say which weights share a scale.

    Raises:
      ValueError: naming the owner and the value.
    """
    if not isinstance(granularity, Granularity):
        raise ValueError(
            f"{owner}.granularity must be tensor(), channel(), group(n) or block(r, c),"
            f" got {granularity!r}"
        )


def check_static_granularity(owner: str, granularity: Granularity) -> None:
    """Refuse blocks of tokens: a learned range belongs to features.

    Raises:
      ValueError: the granularity tells tokens apart.
    """
    if granularity.cols is not None:
        raise ValueError(
            f"{owner}.granularity is {granularity.label}, whose scales belong to "
            "single tokens; for activations take tensor(), or block(g, None) for each "
            "group of g features"
        )
