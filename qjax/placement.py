"""Where calibration runs: batches over the data axis, solvers over N on the model axis.

Works on one device, on a mesh of one process, and on a mesh over several processes that
all hold the same batches and parameters on the host.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "model")


@dataclass(frozen=True)
class Placement:
    """A mesh with the axes "data" and "model", or no mesh at all.

    Raises:
        ValueError: an axis of the mesh has another name, or is explicit.
    """

    mesh: Mesh | None = None

    def __post_init__(self):
        if self.mesh is None:
            return
        other = [name for name in self.mesh.axis_names if name not in AXES]
        if other:
            raise ValueError(
                f"the mesh has an axis {other[0]!r}; calibration shards over the axes "
                '"data" and "model"'
            )
        if AxisType.Explicit in self.mesh.axis_types:
            raise ValueError(
                "the mesh has explicit axes; make it with "
                "axis_types=(jax.sharding.AxisType.Auto, ...)"
            )

    @property
    def several_processes(self) -> bool:
        """Whether some devices of the mesh belong to other processes."""
        return self.mesh is not None and self.mesh.is_multi_process

    @property
    def data(self) -> int:
        """How many devices share the batches."""
        return 1 if self.mesh is None else dict(self.mesh.shape).get("data", 1)

    def tokens(self, M: int) -> int:
        """Among how many devices `M` tokens are shared."""
        return self.data if M % self.data == 0 else 1

    def gathered(self, batches: Sequence[Any]) -> list[tuple[Any, bool]]:
        """Every so many batches of equal shape as one, a batch for each device.

        Each device then runs the program that one device runs on one batch. Batches
        that are left over stay as they are; the flag says which are joined.
        """
        if self.data == 1:
            return [(batch, False) for batch in batches]
        groups: dict[Any, list[Any]] = {}
        for batch in batches:
            leaves, tree = jax.tree.flatten(batch)
            shapes = tuple((np.shape(x), str(np.asarray(x).dtype)) for x in leaves)
            groups.setdefault((tree, shapes), []).append(batch)
        joined: list[tuple[Any, bool]] = []
        for same in groups.values():
            whole = len(same) // self.data * self.data
            for start in range(0, whole, self.data):
                together = jax.tree.map(_join, *same[start : start + self.data])
                joined.append((together, True))
            joined += [(batch, False) for batch in same[whole:]]
        return joined

    def batch(self, x: Any, joined: bool) -> Any:
        """An input of `f`, its first axis over the data axis if it is a joined one."""
        if self.mesh is None:
            return x
        named = joined and np.ndim(x) > 0 and "data" in self.mesh.axis_names
        return self._put(x, PartitionSpec("data") if named else PartitionSpec())

    def whole(self, x: Any) -> Any:
        """A weight or constant, on every device unless it is placed already."""
        if self.mesh is None or isinstance(getattr(x, "sharding", None), NamedSharding):
            return x
        return self._put(x, PartitionSpec())

    def _put(self, x: Any, spec: PartitionSpec) -> Any:
        assert self.mesh is not None
        sharding = NamedSharding(self.mesh, spec)
        if not self.several_processes:
            return jax.device_put(x, sharding)
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, sharding, lambda at: host[at])

    def matrices(self, ws: Sequence[Any]) -> list[Any]:
        """Inside a compiled solver: `w[..., K, N]` with N over the model axis."""
        if self.mesh is None or "model" not in self.mesh.axis_names:
            return list(ws)
        size = self.mesh.shape["model"]

        def one(w: Any) -> Any:
            if w.shape[-1] % size:
                return w
            spec = PartitionSpec(*(None,) * (w.ndim - 1), "model")
            sharding = NamedSharding(self.mesh, spec)  # pyright: ignore[reportArgumentType]
            return jax.lax.with_sharding_constraint(w, sharding)

        return [one(w) for w in ws]

    def everywhere(self, tree: Any) -> Any:
        """Inside a compiled solver: results that every process must be able to read."""
        if self.mesh is None:
            return tree
        sharding = NamedSharding(self.mesh, PartitionSpec())
        return jax.tree.map(
            lambda x: jax.lax.with_sharding_constraint(x, sharding), tree
        )


def _join(*xs: Any) -> Any:
    return np.concatenate([np.asarray(x) for x in xs]) if np.ndim(xs[0]) else xs[0]


NOWHERE = Placement()
