"""Training on a mesh: batches over all devices, parameters over some (FSDP).

Every array of the state, and of frozen parameters, lies in pieces along its longest
axis that the axis "fsdp" of the mesh divides; XLA gathers a layer where it is used and
reduces its gradient into the pieces. With "data" alone everything lies whole on every
device, and only batches are shared (data parallelism).
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp")
SMALL = 2**10
"""Elements; an array of fewer stays whole."""


def training_mesh(data: int, fsdp: int) -> Mesh | None:
    """The first `data * fsdp` devices; None for one.

    Raises:
      ValueError: a count is out of range, or there are not so many devices.
    """
    for name, value in (("data", data), ("fsdp", fsdp)):
        if value < 1:
            raise ValueError(f"the mesh's {name} is {value}: give 1 or more")
    count, there = data * fsdp, jax.device_count()
    if count > there:
        raise ValueError(
            f"a mesh of data {data} times fsdp {fsdp} needs {count} devices, of which "
            f"there are {there}"
        )
    if count == 1:
        return None
    types = (AxisType.Auto,) * 2
    return jax.make_mesh((data, fsdp), AXES, types, devices=jax.devices()[:count])


def shardings(tree: Any, mesh: Mesh) -> Any:
    """Where each array of a tree lies; one in the host's memory stays there."""

    def one(x: Any) -> NamedSharding:
        now = getattr(x, "sharding", None)
        kind = getattr(now, "memory_kind", None)
        return NamedSharding(mesh, _spec(x, mesh), memory_kind=kind)

    return jax.tree.map(one, tree)


def _spec(x: Any, mesh: Mesh) -> PartitionSpec:
    ways = mesh.shape["fsdp"]
    split = [i for i, size in enumerate(np.shape(x)) if size % ways == 0]
    if ways == 1 or np.size(x) < SMALL or not split:
        return PartitionSpec()
    longest = max(split, key=lambda i: np.shape(x)[i])
    return PartitionSpec(*(None,) * longest, "fsdp")


def batch_sharding(mesh: Mesh, rows: int, axis: int) -> NamedSharding:
    """Batches of so many rows along an axis: over all devices if these divide them."""
    if rows % mesh.size:
        return NamedSharding(mesh, PartitionSpec())
    return NamedSharding(mesh, PartitionSpec(*(None,) * axis, AXES))
