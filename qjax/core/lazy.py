"""A parameter that is still on disk."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax


@dataclasses.dataclass(frozen=True, eq=False)
class LazyLeaf:
    """Stands for a leaf; transposition, stacking and casting are done on read.

    Not a registered pytree: JAX sees one leaf.

    Attributes:
      shape: of the array that `read` returns.
      dtype: of that array.
      read: reads it, anew on every call; the caller drops it when done.
      read_layer: reads one index of the first axis alone, where the leaf is a stack of
        layers that are stored apart; None where only the whole can be read.
      stamp: equal for equal content, and known without reading it: place in the file,
        the file's size and time of change. Empty where only the content tells.
    """

    shape: tuple[int, ...]
    dtype: Any
    read: Callable[[], jax.Array] = dataclasses.field(repr=False)
    read_layer: Callable[[int], jax.Array] | None = dataclasses.field(
        default=None, repr=False
    )
    stamp: str = ""

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)
