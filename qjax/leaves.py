"""Float leaves, one layer at a time, with the transforms that were found for them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from qjax.core.lazy import LazyLeaf
from qjax.core.qtensor import QTensor, Stacked
from qjax.placement import NOWHERE, Placement

LeafKey = tuple[int, tuple[int, ...]]


@dataclass(frozen=True)
class Leaves:
    """The float parameters of a program.

    Attributes:
      values: arrays or lazy leaves, in the program's order.
      edits: what was folded into a layer of a leaf, in order: functions of the layer.
      moves: transforms of a site's input that could not be folded: `W = T_in W'`.
      inverses: for the same sites, `W -> W'` on the layer.
      placement: the mesh.
    """

    values: Sequence[Any]
    edits: dict[LeafKey, list[Callable[[Any], Any]]] = field(default_factory=dict)
    moves: dict[LeafKey, Any] = field(default_factory=dict)
    inverses: dict[LeafKey, Callable[[Any], Any]] = field(default_factory=dict)
    placement: Placement = NOWHERE

    def stored(self, key: LeafKey) -> Any:
        """A layer as the model has it."""
        return self.placement.whole(self._stored(key))

    def _stored(self, key: LeafKey) -> Any:
        leaf, index = self.values[key[0]], key[1]
        if isinstance(leaf, Stacked):
            return leaf.layers(index[0], index[0] + 1)[0] if index else leaf
        if isinstance(leaf, QTensor):
            return leaf[index] if index else leaf
        if not isinstance(leaf, LazyLeaf):
            return jnp.asarray(leaf)[index] if index else jnp.asarray(leaf)
        if index and leaf.read_layer is not None:
            layer = leaf.read_layer(index[0])
            return layer[index[1:]] if index[1:] else layer
        whole = leaf.read()
        return whole[index] if index else whole

    def read(self, key: LeafKey) -> Any:
        """A layer with what was folded into it: the same function as before."""
        layer = self.stored(key)
        for edit in self.edits.get(key, ()):
            layer = edit(layer)
        return layer

    def inner(self, key: LeafKey) -> jax.Array:
        """What is to be quantized: `W'` of `W = T_in W'`."""
        layer = self.read(key)
        inverse = self.inverses.get(key)
        return layer if inverse is None else inverse(layer)

    def move(self, key: LeafKey) -> Any:
        """The transform of the site's input, or None."""
        return self.moves.get(key)
