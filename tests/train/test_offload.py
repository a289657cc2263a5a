"""The optimiser's state in the host's memory: the same steps, bit for bit."""

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

from qjax.train import offload
from qjax.train.loop import load_state, save_state
from qjax.train.sharded import shardings, training_mesh
from qjax.train.step import begin, training_step

PARAMS = {"w": jax.random.normal(jax.random.key(0), (64, 32))}


def loss(trained, carried, x, key):
    return jnp.mean((x @ trained["w"] - 1) ** 2), carried


def kinds(state):
    arrays = [x for x in jax.tree.leaves(state) if x.ndim]
    return {x.sharding.memory_kind for x in arrays}


def test_steps_are_the_same_and_moments_are_on_the_host(tmp_path):
    plain = optax.adamw(1e-2)
    there = offload.offloaded(plain)
    states = [begin(PARAMS, each) for each in (plain, there)]
    steps = [jax.jit(training_step(loss, each)) for each in (plain, there)]
    for number in range(3):
        x = jax.random.normal(jax.random.key(number), (1, 8, 64))
        key = jax.random.key(9)
        states = [step(state, x, key)[0] for step, state in zip(steps, states)]
    chex.assert_trees_all_equal(*(jax.device_get(state) for state in states))
    assert kinds(states[0].optimiser) == {"device"}
    assert kinds(states[1].optimiser) == {"pinned_host"}
    assert kinds(states[1].trained) == {"device"}
    again = load_state(save_state(tmp_path, states[1]), states[1])
    chex.assert_trees_all_equal(jax.device_get(again), jax.device_get(states[1]))
    assert kinds(again.optimiser) == {"pinned_host"}
    mesh = training_mesh(1, 2)
    assert kinds(jax.device_put(states[1], shardings(states[1], mesh)).optimiser) == {
        "pinned_host"
    }


def test_a_backend_without_host_memory_is_named(monkeypatch):
    monkeypatch.setattr(offload, "has_host_memory", lambda: False)
    with pytest.raises(ValueError, match="cpu has no memory of the host"):
        offload.offloaded(optax.sgd(1.0))
