"""The programs of serving: one decode step and one prefill, as shapes on a mesh."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Int

from qjax.ops import Target, pack
from qjax.plan.layouts import Layout
from qjax.plan.machines import Machine
from qjax.plan.placed import apply_placed
from qjax.plan.placing import (
    kv_heads,
    make_mesh,
    place,
    place_cache,
    place_params,
)
from qjax.plan.serving import Serving
from qjax.plan.shapes import quantized_shapes

STEPS = ("decode", "prefill")
MOST = 2**31 - 1


@dataclass(frozen=True)
class Load:
    """What is asked of a machine.

    Attributes:
      step: "decode": one token for every sequence; "prefill": the prompt of one.
      batch: sequences with room in the cache.
      context: tokens of room for each.
      prompt: tokens of a prompt.

    Raises:
      ValueError: a number is below 1 or no int32, or the prompt is longer than the
        context.
    """

    step: str
    batch: int
    context: int
    prompt: int

    def __post_init__(self):
        for name in ("batch", "context", "prompt"):
            if not 1 <= getattr(self, name) <= MOST:
                raise ValueError(f"--{name} is {getattr(self, name)}: give 1 to {MOST}")
        if self.prompt > self.context:
            raise ValueError(
                f"--prompt is {self.prompt}, but --context leaves room for "
                f"{self.context} tokens"
            )


@dataclass(frozen=True)
class Step:
    """A program: `f(*arguments)`; `donated` are the arguments that it may overwrite."""

    f: Callable[..., Any]
    arguments: tuple[Any, ...]
    donated: tuple[int, ...]


def make_step(
    layout: Layout, serving: Serving, machine: Machine, load: Load, devices: Any
) -> Step:
    """The program of a load, with a sharding on every shape.

    The step is that of `qjax.generate`: `f` as it stands on the cache, then the
    likeliest token. A prefill writes one sequence into a cache of its own.

    Raises:
      ValueError: a weight or the cache cannot be cut among so many devices.
    """
    f, params = stored(layout, serving.weights, target(machine))
    decoding = load.step == "decode"
    batch, length = (load.batch, 1) if decoding else (1, load.prompt)
    assert f.init_cache is not None
    cache = jax.eval_shape(partial(f.init_cache, batch, load.context, serving.cache))
    mesh = make_mesh(devices, kv_heads(cache))
    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    step = partial(_next, apply_placed(f, target(machine), mesh))
    placed = place_params(params, mesh)
    whole = place(tokens, PartitionSpec(), mesh)
    return Step(step, (placed, place_cache(cache, mesh), whole), donated=(1,))


@cache
def stored(layout: Layout, weights: str | None, place: Target) -> tuple[Any, Any]:
    """`(f, params)`: the scheme's arrays as a machine keeps them, in shapes.

    One GPU has them as `qjax.pack` makes them for XLA; packed arrays are not cut.
    """
    f, params = layout.shapes()
    if weights is None:
        return f, params
    params = quantized_shapes(f, params, weights)
    if place.platform == "gpu" and place.devices == 1:
        params = jax.eval_shape(partial(pack, target=place), params)
    return f, params


def target(machine: Machine) -> Target:
    """What decides between implementations there."""
    generation = machine.chip.name if machine.platform == "tpu" else None
    return Target(machine.platform, generation, machine.devices)


def _next(f: Any, params: Any, cache: Any, tokens: Int[Array, "B T"]) -> Any:
    logits, cache = f(params, tokens, cache)
    return jnp.argmax(logits[:, -1], axis=-1).astype(jnp.int32), cache
