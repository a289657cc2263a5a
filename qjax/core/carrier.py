"""Leaves that bring more than a weight to where they meet an activation."""

from abc import ABC, abstractmethod
from typing import Any

from qjax.core.layout import Layout


class Carrier(ABC):
    """What stands in the place of a float or quantized leaf inside a transform.

    A registered pytree. Every child but the weight has the leaf's leading axes (layers)
    in front, so that a carrier is scanned and indexed as the leaf would be. What it
    means at a site is the rule's business; anywhere else it is `dequantize`d.

    Attributes:
      layout: roles of the leaf's trailing axes where it is contracted.
      dtype: the leaf's dtype.
    """

    layout: Layout
    dtype: Any

    @property
    @abstractmethod
    def acts(self) -> tuple[Any, ...]:
        """One entry for each site that has a record of its own."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The leaf's own shape."""

    @property
    def ndim(self) -> int:
        """The leaf's number of axes."""
        return len(self.shape)

    @abstractmethod
    def dequantize(self, dtype: Any = None) -> Any:
        """The float leaf that it stands for, in its own shape."""
