"""What a method that optimises whole blocks is, and what such methods share.

`qjax/blocksolver.py` lets the weights of a block pass through `fake`, compares the
block's output with that of the full-precision model, and minimises the difference in
what `init` gave.
"""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from qjax.core.formats import Int
from qjax.core.statistics import Statistic
from qjax.methods.base import Solution, positive_integer
from qjax.methods.shared import Formatted

Trained = dict[str, Any]
"""What is learned for one weight, by name."""


@dataclass(frozen=True)
class Blockwise(Formatted):
    """A method that solves all sites of a block together, by gradient descent.

    `keep_best`: what is learned is that of the smallest loss, not of the last step.
    `summed`: the loss is summed over features, not averaged.

    Raises:
        ValueError: a field out of range, a static activation range, or outlier
            features.
    """

    _: KW_ONLY
    iters: int = 200
    batch_size: int = 8
    quantized_input: bool = True

    blockwise = True
    keep_best = True
    summed = False

    def __post_init__(self):
        super().__post_init__()
        own = type(self).__name__
        positive_integer(own, "iters", self.iters)
        positive_integer(own, "batch_size", self.batch_size)
        if self.activation is not None and not self.activation.dynamic:
            raise ValueError(
                f"{own}.activations have a static range, which is not known while "
                "blocks are optimised; take dynamic ones, such as scheme='W8A8'"
            )
        if self.activation is not None and self.activation.outliers is not None:
            raise ValueError(
                f"{own}.activations has outliers={self.activation.outliers!r}, and "
                "features are not split while blocks are optimised; leave it out, or "
                "take another method such as GPTQ"
            )

    @property
    def random(self) -> bool:
        """Minibatches are drawn, so that a key is needed."""
        return True

    @property
    def statistics(self) -> dict[str, Statistic]:
        """None: the block's own inputs are seen."""
        return {}

    @property
    def full_precision(self) -> bool:
        """The outputs of the full-precision stream are the target."""
        return True

    @property
    def shared(self) -> bool:
        """Whether columns of weights, and of what is learned, are independent."""
        return False

    @abstractmethod
    def init(self, w: Float[Array, "... K N"]) -> Trained:
        """What is learned, before the first step; float32."""

    @abstractmethod
    def fake(
        self, w: Float[Array, "... K N"], trained: Trained, progress: Any
    ) -> Float[Array, "... K N"]:
        """The weight as it is quantized, differentiable in `trained`.

        What its input is multiplied by, if anything, is `moved`.

        `progress` is the share of the steps that are done, in [0, 1].
        """

    @abstractmethod
    def optimizer(self) -> optax.GradientTransformation:
        """How a list of what is learned, one for each site, is updated."""

    @abstractmethod
    def finish(self, w: Float[Array, "... K N"], trained: Trained) -> Solution:
        """The coded weight."""

    def moved(self, trained: Trained) -> Any:
        """The learned transform of the site's input, before which `fake` stands."""

    def project(self, trained: Trained) -> Trained:
        """What is learned, brought back into its range after a step."""
        return trained

    def penalty(self, trained: Trained, progress: Any) -> Any:
        """What is added to the mean squared error of the block."""
        return np.float32(0)

    def solve_site(
        self, w: Float[Array, "... K N"], stats: Mapping[str, Any], key: Any = None
    ) -> Solution:
        """A site that no batch reaches: as it is before the first step."""
        return self.finish(w, self.init(w.astype(jnp.float32)))


@dataclass(frozen=True)
class BlockwiseIntegers(Blockwise):
    """One that learns integer codes.

    Raises:
        ValueError: formats that are no integers.
    """

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.format, Int):
            raise ValueError(
                f"{type(self).__name__} learns integer codes, not {self.format.name}; "
                "take a format such as Int(4, group(128))"
            )

    @property
    def integers(self) -> Int:
        """How the weights are stored."""
        assert isinstance(self.format, Int)
        return self.format
