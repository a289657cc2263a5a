"""Who holds what: weights and cache over the devices of a machine.

Tensor parallelism of Megatron-LM (Shoeybi et al., 2019): the outputs of queries, keys,
values, gate and up are cut, then the inputs of the projections after them, so that each
half of a block ends in one sum over devices; embedding and head are cut along the
vocabulary. Experts are cut like the MLP they are, so every device holds a part of each.
"""

from collections.abc import Sequence
from fnmatch import fnmatch
from math import gcd
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qjax.core.qtensor import is_quantized
from qjax.core.sharding import partition_specs
from qjax.models.layers import Cache
from qjax.plan.placed import cut
from qjax.trace.paths import flatten_with_paths

HEADS, REST = "heads", "rest"
MODEL = (HEADS, REST)
"""The mesh axes that cut weights; key-value heads are cut by the first only."""

OUTPUTS = ("q_proj", "k_proj", "v_proj", "qkv_proj", "gate_proj", "up_proj")
OUTPUTS += ("gate_up_proj", "lm_head")
INPUTS = ("o_proj", "down_proj")


def kv_heads(cache: Cache) -> int:
    """How many heads the keys `[L, B, S, G, d]` of a cache have."""
    return next(x.shape[3] for x in jax.tree.leaves(cache.k) if x.ndim == 5)


def make_mesh(devices: Sequence[Any], kv_heads: int) -> Mesh:
    """All devices, as many along "heads" as share the key-value heads evenly."""
    heads = gcd(len(devices), kv_heads)
    return Mesh(np.array(devices).reshape(heads, -1), MODEL)


def spec(path: str, ndim: int) -> PartitionSpec:
    """How a float leaf is cut."""
    free = (None,) * (ndim - 2)
    for names, own in ((OUTPUTS, (None, MODEL)), (INPUTS, (MODEL, None))):
        if any(fnmatch(f"/{path}", f"*/{name}/kernel") for name in names):
            return PartitionSpec(*free, *own)
    if fnmatch(f"/{path}", "*/embed/embedding"):
        return PartitionSpec(MODEL, None)
    return PartitionSpec()


def place_params(params: Any, mesh: Mesh) -> Any:
    """Shapes with their shardings; a QTensor's arrays follow from the leaf's spec.

    A float leaf that does not split evenly, such as the embedding of an odd vocabulary,
    is whole on every device.

    Raises:
      ValueError: a quantized leaf cannot be cut into so many parts.
    """
    named = flatten_with_paths(params)
    placed = [_leaf(path, leaf, mesh) for path, leaf in named]
    tree = jax.tree.structure(params, is_leaf=is_quantized)
    return jax.tree.unflatten(tree, placed)


def _leaf(path: str, leaf: Any, mesh: Mesh) -> Any:
    if mesh.size == 1:
        return jax.tree.map(lambda x: place(x, PartitionSpec(), mesh), leaf)
    wanted = spec(path, leaf.ndim)
    try:
        specs: Any = wanted
        if is_quantized(leaf):
            specs = partition_specs(leaf, wanted, mesh)  # pyright: ignore
    except ValueError as error:
        raise ValueError(f"{path} on {mesh.size} devices: {error}") from error
    if is_quantized(leaf):
        arrays, tree = jax.tree.flatten(cut(leaf, wanted))
        each = jax.tree.leaves(specs, is_leaf=lambda s: isinstance(s, PartitionSpec))
        return jax.tree.unflatten(
            tree, [place(x, s, mesh) for x, s in zip(arrays, each)]
        )
    return place(leaf, wanted if _even(leaf, wanted, mesh) else PartitionSpec(), mesh)


def _even(leaf: Any, wanted: PartitionSpec, mesh: Mesh) -> bool:
    """Whether the devices get equal parts; else all of them get the whole leaf."""
    pairs = zip(leaf.shape, tuple(wanted))
    return not any(axis is not None and size % mesh.size for size, axis in pairs)


def place(x: Any, spec: PartitionSpec, mesh: Mesh) -> jax.ShapeDtypeStruct:
    """A shape with its sharding."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))


def place_cache(cache: Cache, mesh: Mesh) -> Cache:
    """Heads over "heads"; over "rest", sequences if they split evenly, else slots.

    Raises:
      ValueError: neither splits.
    """
    ways = mesh.shape[REST]
    batch, slots = cache.valid.shape
    if batch % ways and slots % ways:
        raise ValueError(
            f"the cache of {batch} sequences of {slots} tokens does not split "
            f"{ways} ways: choose a batch or a context that {ways} divides"
        )
    rows, columns = (REST, None) if batch % ways == 0 else (None, REST)
    specs = {
        5: PartitionSpec(None, rows, columns, HEADS, None),
        4: PartitionSpec(None, rows, HEADS, columns),  # scales of an int8 cache
    }

    def kept(x: Any) -> Any:
        return place(x, specs[x.ndim], mesh)

    return Cache(
        k=jax.tree.map(kept, cache.k),
        v=jax.tree.map(kept, cache.v),
        valid=place(cache.valid, PartitionSpec(), mesh),
        length=place(cache.length, PartitionSpec(), mesh),
    )


def per_device(tree: Any) -> Any:
    """The shapes of one device's shards."""

    def one(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.sharding.shard_shape(x.shape), x.dtype)

    return jax.tree.map(one, tree)
