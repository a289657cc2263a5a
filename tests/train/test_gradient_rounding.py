"""DoReFa's gradients: the paper's formula, unbiased, and only on the way back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.train.dorefa import rounded_gradient

RNG = np.random.default_rng(0)
D = jnp.asarray(RNG.normal(size=(3, 4, 5)), jnp.float32).at[1].set(0)
PARAMS = {
    "up": jnp.asarray(RNG.normal(size=(8, 16)) / 3, jnp.float32),
    "layers": jnp.asarray(RNG.normal(size=(2, 16, 16)) / 4, jnp.float32),
}
X = jnp.asarray(RNG.normal(size=(6, 8)), jnp.float32)


@pytest.mark.parametrize("bits", [2, 6])
def test_equation_12(bits):
    key, n = jax.random.key(1), 2**bits - 1
    noise = np.asarray(jax.random.uniform(key, D.shape, jnp.float32, -0.5, 0.5))
    want = np.zeros(D.shape)
    for i in (0, 2):
        m = np.abs(D[i]).max()
        shifted = np.float64(D[i]) / (2 * m) + 0.5 + noise[i] / n
        want[i] = 2 * m * (np.round(n * shifted) / n - 0.5)
    found = rounded_gradient(D, key, bits)
    np.testing.assert_allclose(found, want, atol=1e-6)
    assert len(np.unique(np.round(found[0], 5))) <= 2**bits


def test_noise_leaves_the_mean():
    keys = jax.random.split(jax.random.key(2), 4000)
    drawn = jax.vmap(lambda key: rounded_gradient(D, key, 2))(keys)
    spread = np.asarray(drawn.std(0)) / np.sqrt(len(keys))
    error = np.abs(np.asarray(drawn.mean(0)) - D)
    assert (error <= 5 * spread + 1e-6).all()


def f(p, x):
    h = jnp.tanh(x @ p["up"])
    return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, p["layers"])[0]


@jax.jit
def gradients(key):
    weights = qjax.StraightThrough(qjax.Int(8))
    recipe = qjax.QAT(weights, gradients=qjax.DoReFaGradients(4))
    f_qat, qstate = qjax.fake_quantize(f, PARAMS, recipe, example=(X,))
    loss = lambda p: jnp.sum(f_qat(p, qstate, X, key=key)[0] ** 2)
    return jax.value_and_grad(loss)(PARAMS)


def test_training_sees_rounded_gradients_of_every_layer():
    value, exact = gradients(None)
    plain, qstate = qjax.fake_quantize(
        f, PARAMS, qjax.QAT(qjax.StraightThrough(qjax.Int(8))), example=(X,)
    )
    loss = lambda p: jnp.sum(plain(p, qstate, X)[0] ** 2)
    same = jax.grad(loss)(PARAMS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), exact, same)
    values, drawn = jax.vmap(gradients)(jax.random.split(jax.random.key(3), 2000))
    np.testing.assert_allclose(values, np.full(2000, value), rtol=1e-6)
    for path in ("up", "layers"):
        mean, wanted = np.asarray(drawn[path].mean(0)), np.asarray(exact[path])
        spread = np.asarray(drawn[path].std(0))
        assert (spread > 0).all()
        assert np.linalg.norm(mean - wanted) < 0.03 * np.linalg.norm(wanted)


def test_bad_fields_are_named():
    with pytest.raises(ValueError, match=r"DoReFaGradients\.bits must be"):
        qjax.DoReFaGradients(1)
    with pytest.raises(TypeError, match=r"QAT\.gradients must be DoReFaGradients"):
        qjax.QAT(qjax.DoReFa(4), gradients=6)
