"""Compile for a TPU that is not there: libtpu does on any x86 machine.

The environment must be set before JAX is imported: import this module first.
"""

import os
from collections.abc import Callable
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"

import jax
from jax.experimental import topologies

TOPOLOGIES = {"v5e": "v5e:2x2", "v6e": "v6e:2x2", "v7x": "tpu7x:2x2x1"}


def sharding(generation: str) -> Any:
    """Where arguments live: the first device of a machine of that generation."""
    topology = topologies.get_topology_desc(
        platform="tpu", topology_name=TOPOLOGIES[generation]
    )
    return jax.sharding.SingleDeviceSharding(topology.devices[0])


def compiled(generation: str, f: Callable[..., Any], *shapes: Any) -> Any:
    """`f` compiled for one device, from shapes alone."""
    place = sharding(generation)
    placed = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes
    )
    return jax.jit(f).trace(*placed).lower().compile()
