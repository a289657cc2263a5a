"""Gradient descent on what block methods learn: all steps in one `lax.scan`.

Every step draws calibration batches, and goes by the gradient of their error.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

Learned = list[dict[str, Any]]
"""What is learned for each site."""


def descended(
    methods: Sequence[Any],
    start: Learned,
    faked: Callable[[Learned, Any], Any],
    errors: Sequence[Callable[[Any, Any], Any]],
    batches: Sequence[tuple[int, int]],
    key: Any,
) -> Learned:
    """What is learned after all steps, or at the step of the smallest loss.

    The loss is that of a step's own batches, before the step.

    Args:
      methods: one for each site; all take as many steps.
      start: what is learned, before the first step.
      faked: the leaves, of what is learned and the share of the steps that are done.
      errors: for each lane, the mean error of leaves on batches of given numbers.
      batches: for each lane, how many batches make a step, and how many there are.
      key: for the choice of batches.
    """
    iters = methods[0].iters
    optimizer, draw = Together(methods), drawing(batches)

    def loss(learned: Learned, step: Any) -> Any:
        progress = step.astype(jnp.float32) / np.float32(iters)
        lane, chosen = draw(key, step)
        leaves = faked(learned, progress)
        error = jax.lax.switch(lane, [partial(e, leaves) for e in errors], chosen)
        pairs = zip(methods, learned)
        return error + sum(method.penalty(t, progress) for method, t in pairs)

    def take(carry: Any, step: Any) -> Any:
        learned, state, least, best = carry
        value, slope = jax.value_and_grad(loss)(learned, step)
        better = value < least
        best = jax.tree.map(partial(jnp.where, better), learned, best)
        learned, state = optimizer.step(slope, state, learned)
        return (learned, state, jnp.where(better, value, least), best), None

    carry = start, optimizer.init(start), jnp.float32(np.inf), start
    (last, _, _, best), _ = jax.lax.scan(take, carry, jnp.arange(iters))
    return best if methods[0].keep_best else last


class Together:
    """The optimizers of the sites' methods, one for all sites of a method."""

    def __init__(self, methods: Sequence[Any]):
        self.groups = {
            method: [i for i, m in enumerate(methods) if m == method]
            for method in dict.fromkeys(methods)
        }
        self.optimizers = {method: method.optimizer() for method in self.groups}

    def init(self, learned: Learned) -> list[Any]:
        """The optimizers' states."""
        return [
            self.optimizers[method].init([learned[i] for i in mine])
            for method, mine in self.groups.items()
        ]

    def step(
        self, slope: Learned, states: Sequence[Any], learned: Learned
    ) -> tuple[Learned, list[Any]]:
        """What is learned, and the states, after one step."""
        new, after = list(learned), []
        for (method, mine), state in zip(self.groups.items(), states):
            own = [learned[i] for i in mine]
            slopes = [slope[i] for i in mine]
            change, state = self.optimizers[method].update(slopes, state, own)
            moved: Any = optax.apply_updates(own, change)
            for i, each in zip(mine, moved):
                new[i] = method.project(each)
            after.append(state)
        return new, after


def drawing(batches: Sequence[tuple[int, int]]) -> Callable[[Any, Any], Any]:
    """Which batches a step takes: `draw(key, step)`, the lane and numbers in each lane.

    As in the reference of AutoRound, batches are shuffled, taken in order, and shuffled
    anew when fewer are left than a step takes. Lanes take turns at random.

    Args:
      batches: for each lane, how many batches make a step, and how many there are.
    """
    sizes = [min(size, count) for size, count in batches]
    steps = [
        (lane, size * i)
        for lane, (size, (_, count)) in enumerate(zip(sizes, batches))
        for i in range(count // size)
    ]
    owner, first = (np.array(column, np.int32) for column in zip(*steps))

    def draw(key: Any, step: Any) -> tuple[Any, list[Any]]:
        turns, *shuffles = jax.random.split(
            jax.random.fold_in(key, step // len(steps)), 1 + len(batches)
        )
        turn = jax.random.permutation(turns, len(steps))[step % len(steps)]
        start = jnp.asarray(first)[turn]
        chosen = [
            jax.lax.dynamic_slice(jax.random.permutation(own, count), (start,), (size,))
            for own, size, (_, count) in zip(shuffles, sizes, batches)
        ]
        return jnp.asarray(owner)[turn], chosen

    return draw
