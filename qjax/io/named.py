"""The leaves of a model under the names of Hugging Face's tensors."""

import re
from collections.abc import Iterator, Mapping
from itertools import product
from types import ModuleType
from typing import Any, NamedTuple

import jax
import numpy as np

from qjax.core.qtensor import Stacked, is_quantized
from qjax.models.names import Name
from qjax.trace.paths import flatten_with_paths


class NamedLeaf(NamedTuple):
    """One tensor of a checkpoint: an array, or a QTensor without leading axes.

    Attributes:
      name: Hugging Face's, `model.layers.0.mlp.up_proj.weight`.
      path: of the leaf, with the numbers of layer and expert.
      leaf: as the model has it, `[in, out]` for a linear layer.
      transpose: whether torch keeps it as `[out, in]`.
    """

    name: str
    path: str
    leaf: Any
    transpose: bool

    @property
    def module(self) -> str:
        """The torch module that the tensor belongs to."""
        return self.name.rpartition(".")[0]

    @property
    def linear(self) -> bool:
        """Whether it is the weight of a torch `Linear`."""
        return self.transpose and self.name.endswith(".weight")

    @property
    def conv1d(self) -> bool:
        """Whether it is the weight of transformers' `Conv1D`: GPT-2's linears."""
        return is_conv1d(self.name, self.path, self.transpose)

    def array(self) -> np.ndarray:
        """A float leaf as torch keeps it."""
        host = np.asarray(self.leaf)
        return np.ascontiguousarray(host.T if self.transpose else host)


def is_conv1d(name: str, path: str, transpose: bool) -> bool:
    """Whether a row of the table is the weight of a `Conv1D`, kept as `[in, out]`."""
    return not transpose and name.endswith(".weight") and path.endswith("/kernel")


def named_leaves(module: ModuleType, config: Any, params: Any) -> Iterator[NamedLeaf]:
    """Every leaf of `params`, stacked ones layer by layer, in the table's order.

    Raises:
      ValueError: a leaf has no place in the table.
    """
    leaves, used = dict(flatten_with_paths(params)), set[str]()
    for row in module.names(config):
        per_layer = "{layer}" in row.path
        stacked = row.path.replace("/{layer}", "")
        if per_layer and stacked in leaves:
            used.add(stacked)
            yield from _slices(row, config, leaves[stacked], range(config.layers))
            continue
        for layer in range(config.layers) if per_layer else range(1):
            path = row.path.format(layer=layer)
            if path in leaves:
                used.add(path)
                yield from _slices(row, config, leaves[path], None, layer)
    for path in leaves:
        if path not in used:
            raise ValueError(
                f"{path} has no name in a Hugging Face checkpoint of this model"
            )


def check_whole(shapes: Mapping[str, tuple[int, ...]], params: Any) -> None:
    """Refuse parameters that are not all of a model's, each of its shape.

    Args:
      shapes: of the model's leaves, by their paths with unrolled layers.
      params: with unrolled layers, or with stacked ones, `[layers, ...]`.

    Raises:
      ValueError: a leaf is missing, is none of the model's or has another shape.
    """
    leaves = {path: tuple(leaf.shape) for path, leaf in flatten_with_paths(params)}
    expected, layers = dict[str, tuple[int, ...]](), dict[str, int]()
    for path, shape in shapes.items():
        stacked = re.sub(r"^layers/\d+/", "layers/", path)
        if stacked != path and stacked in leaves:
            layers[stacked] = layers.get(stacked, 0) + 1
            path, shape = stacked, (layers[stacked], *shape)
        expected[path] = shape
    for path, shape in expected.items():
        if path not in leaves:
            raise ValueError(
                f"the parameters have no leaf {path}, of which the model's config.json "
                f"expects the shape {list(shape)}"
            )
        if leaves[path] != shape:
            raise ValueError(
                f"{path} has shape {list(leaves[path])}, the model's config.json "
                f"expects {list(shape)}"
            )
    for path in leaves:
        if path not in expected:
            raise ValueError(
                f"{path} has no name in a Hugging Face checkpoint of this model"
            )


def _slices(
    row: Name, config: Any, leaf: Any, layers: range | None, layer: int = 0
) -> Iterator[NamedLeaf]:
    """The tensors of one leaf: one per stacked layer and expert."""
    experts = range(config.experts) if "{expert}" in row.hf else None
    if not hasattr(leaf, "read"):
        leaf = jax.tree.map(np.asarray, leaf)
    for i, e in product(layers or [None], experts or [None]):
        numbers = {"layer": layer if i is None else i, "expert": e}
        path = row.path.format(**numbers)
        path = path if e is None else f"{path}[{e}]"
        index = tuple(n for n in (i, e) if n is not None)
        yield NamedLeaf(row.hf.format(**numbers), path, _at(leaf, index), row.transpose)


def _at(leaf: Any, index: tuple[int, ...]) -> Any:
    """A layer or an expert of a leaf, on the host."""
    if isinstance(leaf, Stacked):
        leaf, index = leaf.layers(index[0], index[0] + 1), (0, *index[1:])
    if is_quantized(leaf):
        return jax.tree.map(lambda x: x[index], leaf)
    if hasattr(leaf, "read"):
        one = leaf.read_layer if index else None
        leaf, index = (
            (leaf.read(), index) if one is None else (one(index[0]), index[1:])
        )
    return np.asarray(leaf)[index]
