"""A mesh changes where things lie, not what is computed."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import qjax
from qjax.train.loop import load_state, save_state
from qjax.train.sharded import batch_sharding, shardings, training_mesh
from qjax.train.step import begin, training_step

K, N = 64, 96
PARAMS = {"w": jax.random.normal(jax.random.key(0), (K, N)), "b": jnp.zeros(N)}


def f(p, x):
    return x @ p["w"] + p["b"]


@pytest.fixture(scope="module")
def job():
    recipe = qjax.QAT(qjax.LSQ(2, qjax.group(32)))
    f_qat, qstate = qjax.fake_quantize(f, PARAMS, recipe, example=(jnp.ones((2, K)),))
    optimiser = optax.adamw(1e-2)

    def loss(trained, observed, x, key):
        own = qjax.train.QState(trained["qstate"], observed, qstate.plans)
        y, after = f_qat(trained["params"], own, x)
        return jnp.mean((y - 1) ** 2), after.observed

    trained = {"params": PARAMS, "qstate": qstate.trained}
    state = begin(trained, optimiser, qstate.observed)
    return training_step(loss, optimiser), state


@pytest.mark.parametrize("data, fsdp", [(4, 1), (2, 4)])
def test_sharded_steps_are_those_of_one_device(job, tmp_path, data, fsdp):
    step, state = job
    mesh, key = training_mesh(data, fsdp), jax.random.key(1)
    where = shardings(state, mesh)
    x = np.random.default_rng(0).normal(size=(3, 2, 8, K)).astype(np.float32)
    alone, run = state, jax.jit(step)
    spread = jax.device_put(state, where)
    sharded = jax.jit(step, out_shardings=(where, None))
    for each in x:
        alone, value = run(alone, each, key)
        placed = jax.device_put(each, batch_sharding(mesh, 8, 1))
        spread, same = sharded(spread, placed, key)
        chex.assert_trees_all_close(value, same, rtol=1e-5)
    chex.assert_trees_all_close(alone, spread, rtol=1e-4, atol=1e-5)
    # The weight and both of AdamW's moments of it: each device holds its piece alone.
    moments = spread.optimiser[0]
    for tree in (spread.trained["params"], moments.mu["params"], moments.nu["params"]):
        assert tree["w"].addressable_shards[0].data.size == K * N // fsdp
    again = load_state(save_state(tmp_path, spread), jax.device_put(state, where))
    chex.assert_trees_all_equal(again, spread)
    assert again.trained["params"]["w"].sharding == where.trained["params"]["w"]


def test_the_longest_axis_that_divides_is_cut():
    mesh = training_mesh(1, 4)
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
    specs = {
        (48, 30, 64): P(None, None, "fsdp"),
        (48, 30, 66): P("fsdp"),
        (33, 35): P(),
        (8, 8): P(),
    }
    for size, spec in specs.items():
        assert shardings(shape(*size), mesh).spec == spec
    assert batch_sharding(mesh, 6, 0).spec == P()


def test_meshes_that_cannot_be_are_refused():
    assert training_mesh(1, 1) is None
    with pytest.raises(ValueError, match="the mesh's fsdp is 0: give 1 or more"):
        training_mesh(1, 0)
    with pytest.raises(ValueError, match="needs 16 devices, of which there are 8"):
        training_mesh(2, 8)
