"""Named arrays in an Orbax folder: every device writes and reads its own shards."""

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from qjax.io.arrays import Spec, spec_of, to_host
from qjax.io.treespec import dtype_of

# TensorStore has no such types.
_UNKNOWN = ("int1", "uint1", "uint2", "uint4")


def write_folder(folder: Path, arrays: Mapping[str, Any]) -> None:
    """Write arrays into a new folder, shard by shard.

    Empty arrays, which Orbax refuses, are left out: their shape says everything.

    Raises:
      TypeError: a dtype that TensorStore cannot hold.
      ValueError: there is no array to write.
    """
    for name, array in arrays.items():
        if spec_of(array)[0] in _UNKNOWN:
            raise TypeError(f"leaf {name} is {array.dtype}, which Orbax cannot hold")
    tree = {
        name: array if isinstance(array, jax.Array) else to_host(array)
        for name, array in arrays.items()
        if prod(array.shape)
    }
    if not tree:
        raise ValueError('the tree holds no array; save it with format="safetensors"')
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder.absolute(), tree)


def read_folder(
    folder: Path,
    specs: Mapping[str, Spec],
    shardings: Mapping[str, jax.sharding.Sharding],
) -> dict[str, jax.Array]:
    """The folder's arrays, each placed as its sharding says."""
    target = {
        name: jax.ShapeDtypeStruct(shape, dtype_of(dtype), sharding=shardings[name])
        for name, (dtype, shape) in specs.items()
    }
    stored = {name: struct for name, struct in target.items() if struct.size}
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(folder.absolute(), stored)
    empty = {
        name: jax.device_put(np.zeros(struct.shape, struct.dtype), struct.sharding)
        for name, struct in target.items()
        if not struct.size
    }
    return restored | empty
