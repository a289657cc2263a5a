"""What gradient descent keeps, and which batches its steps take."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qjax.descent import descended, drawing


@dataclass(frozen=True)
class Straight:
    """A number that goes up by 1 in every step, whatever its loss."""

    iters: int = 6
    keep_best: bool = True

    def optimizer(self):
        return optax.sgd(1.0)

    def project(self, trained):
        return trained

    def penalty(self, trained, progress):
        return 0.0


def last(method):
    """The loss is `(t - 2)^2` with the gradient -1, from `t = 0`."""

    def error(leaves, chosen):
        t = leaves[0]
        held = jax.lax.stop_gradient(t)
        return jnp.square(held - 2) - (t - held)

    start = [{"t": jnp.float32(0)}]
    faked = lambda learned, progress: [learned[0]["t"]]
    key = jax.random.key(0)
    run = jax.jit(lambda: descended([method], start, faked, [error], [(1, 1)], key))
    return float(run()[0]["t"])


def test_the_smallest_loss_is_kept_or_the_last_step():
    assert last(Straight()) == 2
    assert last(Straight(keep_best=False)) == 6


def test_every_batch_is_taken_before_one_is_taken_again():
    draw = jax.jit(drawing([(2, 6)]))
    key = jax.random.key(1)
    steps = [np.asarray(draw(key, jnp.int32(step))[1][0]) for step in range(6)]
    for epoch in (steps[:3], steps[3:]):
        assert sorted(np.concatenate(epoch).tolist()) == list(range(6))
    assert any(not np.array_equal(a, b) for a, b in zip(steps[:3], steps[3:]))
