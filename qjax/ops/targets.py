"""The hardware that a program is built for."""

from dataclasses import dataclass

import jax

from qjax_kernels.compat import generation_of


@dataclass(frozen=True)
class Target:
    """What decides between implementations.

    Args:
      platform: "cpu", "gpu" or "tpu".
      generation: of a TPU: "v5e", "v5p", "v6e" or "v7x"; of a GPU: "hopper"; None for
        others.
      devices: that share one program outside of `shard_map`.
    """

    platform: str
    generation: str | None = None
    devices: int = 1


def here() -> Target:
    """The default devices of this process.

    Where every mesh axis is manual, as in `shard_map`, a program sees one device.
    """
    platform = jax.default_backend()
    mesh = jax.sharding.get_abstract_mesh()
    manual = bool(mesh.axis_names) and set(mesh.manual_axes) == set(mesh.axis_names)
    devices = 1 if manual else jax.device_count()
    return Target(platform, generation_of(jax.devices()[0]), devices)
