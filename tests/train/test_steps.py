"""Learned steps that start at zero, or that training drives there or below."""

from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import qjax
from qjax import QAT
from qjax.train.quantizers import fake_input, fake_weights

pytestmark = pytest.mark.usefixtures("strict")
K, N, M = 32, 12, 7
RNG = np.random.default_rng(0)
W, X, DW, DX = (
    RNG.normal(size=shape).astype(np.float32) for shape in ((K, N), (M, K)) * 2
)
DEAD = jnp.asarray(W).at[:16].set(0)
GROUPS = qjax.group(16)
WEIGHTS = {
    "lsq": qjax.LSQ(4, GROUPS),
    "lsq_plus": qjax.LSQPlus(4, GROUPS),
    **{f"paretoq_{b}": qjax.ParetoQ(b, GROUPS) for b in (1, 1.58, 2, 4)},
}
INPUTS = {
    "lsq": qjax.LSQ(8),
    "unsigned": qjax.LSQ(8, unsigned=True),
    "lsq_plus": qjax.LSQPlus(8),
    "pact": qjax.PACT(8, signed=True),
}


def pulled(run, x, trained, cotangent):
    value, back = jax.vjp(jax.jit(run), jnp.asarray(x), trained)
    return value, *back(jnp.asarray(cotangent))


def test_a_step_of_zero_is_pytorchs_least_one():
    """`_LearnableFakeQuantize` calls its kernel with the step clamped to `eps`."""
    method, w = qjax.LSQ(4), W * 3e-7
    step = torch.full((1,), torch.finfo(torch.float32).eps, requires_grad=True)
    leaf = torch.tensor(w, requires_grad=True)
    units = w / np.float32(step.item())
    clear = (units < -8.5) | (units > 7.5) | ((units >= -8) & (units <= 7))
    want = torch._fake_quantize_learnable_per_tensor_affine(
        leaf, step, torch.zeros(1), -8, 7, 1 / np.sqrt(W.size * 7)
    )
    want.backward(torch.tensor(DW * clear))
    run = lambda w, t: fake_weights(method, w, t, jnp.float32)
    value, dw, dt = pulled(run, w, {"step": jnp.zeros((1, 1))}, DW * clear)
    np.testing.assert_allclose(value, want.detach(), rtol=1e-6)
    np.testing.assert_allclose(dw, leaf.grad, rtol=1e-6)
    np.testing.assert_allclose(dt["step"].reshape(1), step.grad, rtol=1e-4)


@pytest.mark.parametrize("dead", ["a group", "all"])
@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_of_zero_are_trained(name, dead):
    method, w = WEIGHTS[name], DEAD if dead == "a group" else jnp.zeros((K, N))
    run = lambda w, t: fake_weights(method, w, t, jnp.float32)
    value, dw, dt = pulled(run, w, method.init_weights(w), DW)
    chex.assert_tree_all_finite((value, dw, dt))
    np.testing.assert_allclose(value[:16], 0, atol=2e-7)
    np.testing.assert_allclose(dw[:16], DW[:16], rtol=1e-6)
    # Once the weights have moved, what they share is moved too, in every group.
    moved = jax.tree.map(lambda x, g: x - g, (w, method.init_weights(w)), (dw, dt))
    after = jax.vjp(jax.jit(run), *moved)[1](jnp.asarray(DW))[1]
    assert all(jnp.all(jnp.any(g != 0, -1)) for g in jax.tree.leaves(after))


@pytest.mark.parametrize("name", INPUTS)
def test_inputs_of_zero_are_trained(name):
    f, params = (lambda p, x: x @ p["w"]), {"w": jnp.asarray(W)}
    zeros = jnp.zeros((M, K))
    step = QAT(qjax.LSQ(4), INPUTS[name])
    f_qat, qstate = qjax.fake_quantize(f, params, step, [(zeros,)])

    def loss(trained, x):
        return jnp.sum(f_qat(params, replace(qstate, trained=trained), x)[0] * DW[0])

    run = jax.jit(jax.value_and_grad(loss, (0, 1)))
    chex.assert_tree_all_finite(run(qstate.trained, zeros))
    _, (_, dx) = run(qstate.trained, jnp.abs(X) / 4)
    assert jnp.all(dx != 0)


@pytest.mark.parametrize("name", INPUTS)
def test_a_negative_step_is_its_magnitude(name):
    """Forward, finished, and with the gradient that moves it the same way."""
    method, x = INPUTS[name], np.abs(X)
    field = "alpha" if name == "pact" else "step"
    size = jnp.full((1, 1), 1.5 if name == "pact" else 0.01)
    beside = {"offset": jnp.full((1, 1), -0.3)} if name == "lsq_plus" else {}
    run = lambda x, t: fake_input(method, x, t)
    up, down = (pulled(run, x, {field: s, **beside}, DX) for s in (size, -size))
    chex.assert_trees_all_equal(up[:2], down[:2])
    chex.assert_trees_all_equal(up[2][field], -down[2][field])
    assert jnp.any(up[2][field] != 0) and jnp.any(up[0] != 0)
    grids = [method.input_grid({field: s, **beside}) for s in (size, -size)]
    chex.assert_trees_all_equal(*grids)


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_negative_step_of_weights_is_its_magnitude(name):
    method = WEIGHTS[name]
    trained = method.init_weights(jnp.asarray(W))
    turned = jax.tree.map(jnp.negative, trained)
    run = lambda w, t: fake_weights(method, w, t, jnp.float32)
    up, down = (pulled(run, W, t, DW) for t in (trained, turned))
    chex.assert_trees_all_equal(up[:2], down[:2])
    chex.assert_trees_all_equal(up[2], jax.tree.map(jnp.negative, down[2]))
