"""One step of training: a loss, its gradient over several batches, an update."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from qjax.core.pytrees import register

Loss = Callable[..., tuple[Any, Any]]
"""`loss(trained, carried, batch, key, *rest) -> (mean loss, carried)`."""


@dataclass(frozen=True, eq=False)
class TrainState:
    """Everything that a step changes. A pytree.

    Attributes:
      trained: what is differentiated.
      carried: what a step passes on without gradient, such as observed ranges.
      optimiser: the optimiser's state.
      step: how many steps were made, int32.
    """

    trained: Any
    carried: Any
    optimiser: Any
    step: Any


register(TrainState, ("trained", "carried", "optimiser", "step"))


def begin(
    trained: Any, optimiser: optax.GradientTransformation, carried: Any = None
) -> TrainState:
    """The state before the first step."""
    zero = jnp.zeros((), jnp.int32)
    return TrainState(trained, carried, optimiser.init(trained), zero)


def next_token_loss(
    logits: Float[Array, "rows T V"], tokens: Int[Array, "rows T"]
) -> Float[Array, ""]:
    """Mean negative log-likelihood of each token but the first, in nats."""
    scores = optax.softmax_cross_entropy_with_integer_labels(
        logits[:, :-1].astype(jnp.float32), tokens[:, 1:]
    )
    return scores.mean()


def training_step(
    loss: Loss, optimiser: optax.GradientTransformation
) -> Callable[..., tuple[TrainState, Any]]:
    """`step(state, batches, key, *rest) -> (state, mean loss)`, to be jitted.

    `batches` is a pytree of arrays with an axis of accumulation in front: their
    gradients are averaged before the one update. `rest` is given to the loss: frozen
    parameters are arguments, not constants of the program.
    """

    def step(
        state: TrainState, batches: Any, key: Any, *rest: Any
    ) -> tuple[TrainState, Any]:
        count = jax.tree.leaves(batches)[0].shape[0]
        keys = jax.random.split(jax.random.fold_in(key, state.step), count)
        gradient = jax.value_and_grad(loss, has_aux=True)

        def add(total: Any, each: Any) -> tuple[Any, Any]:
            sums, carried = total
            batch, key = each
            (value, carried), grads = gradient(
                state.trained, carried, batch, key, *rest
            )
            return (jax.tree.map(jnp.add, sums, grads), carried), value

        zeros = jax.tree.map(jnp.zeros_like, state.trained)
        (sums, carried), values = jax.lax.scan(
            add, (zeros, state.carried), (batches, keys)
        )
        grads = jax.tree.map(lambda x: x / jnp.asarray(count, x.dtype), sums)
        updates, inner = optimiser.update(grads, state.optimiser, state.trained)
        trained = optax.apply_updates(state.trained, updates)
        return TrainState(trained, carried, inner, state.step + 1), values.mean()

    return step
