"""Optimiser state in the host's memory between steps, by JAX's memory kinds.

QLoRA (https://arxiv.org/abs/2305.14314, section 3, "paged optimizers") lets a GPU's
driver move pages of the optimiser's state to the host when memory runs short. Here the
whole state lies there, and is on the device for the update alone.
"""

from typing import Any

import jax
import optax

HOST, DEVICE = jax.memory.Space.Host, jax.memory.Space.Device


def has_host_memory(device: Any = None) -> bool:
    """Whether a device's backend lets programs keep arrays in the host's memory."""
    device = jax.devices()[0] if device is None else device
    return "pinned_host" in {memory.kind for memory in device.addressable_memories()}


def offloaded(
    optimiser: optax.GradientTransformation,
) -> optax.GradientTransformation:
    """The same optimiser, its arrays (not its counters) kept in the host's memory.

    Raises:
      ValueError: the backend has no memory of the host.
    """
    if not has_host_memory():
        raise ValueError(
            f"{jax.default_backend()} has no memory of the host for arrays, so that "
            "the optimiser's state cannot be kept there; leave out the offload"
        )

    def move(state: Any, space: Any) -> Any:
        return jax.tree.map(lambda x: jax.device_put(x, space) if x.ndim else x, state)

    def init(params: Any) -> Any:
        return move(optimiser.init(params), HOST)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, new = optimiser.update(updates, move(state, DEVICE), params)
        return updates, move(new, HOST)

    return optax.GradientTransformation(init, update)
