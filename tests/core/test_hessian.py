"""The factor of the Hessian against float64, and the ladder of damping."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.core import hessian as core
from qjax.core.hessian import dead_features, drift_target, reverse_cholesky, solve

pytestmark = pytest.mark.usefixtures("strict")
factorize = jax.jit(core.factorize, static_argnums=1)


def inputs(M, K, seed=0):
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(M, K)) @ rng.normal(size=(K, K)) / np.sqrt(K)
    return mixed * np.exp(rng.normal(size=K))


def hessian(M=400, K=96, seed=0):
    x = inputs(M, K, seed)
    return (x.T @ x / M).astype(np.float32)


def damped(h, fraction):
    h = h.astype(np.float64)
    return h + fraction * np.diag(h).mean() * np.eye(len(h))


def test_the_inverse_of_the_factor_is_the_factor_of_the_inverse():
    h = hessian().astype(np.float64)
    h += 0.01 * np.diag(h).mean() * np.eye(len(h))
    published = np.linalg.cholesky(np.linalg.inv(h)).T
    ours = np.asarray(reverse_cholesky(jnp.asarray(h, jnp.float32)), np.float64)
    assert (np.tril(ours, -1) == 0).all()
    np.testing.assert_allclose(ours @ ours.T, h, atol=1e-6 * np.abs(h).max())
    np.testing.assert_allclose(
        np.linalg.inv(ours), published, atol=1e-4 * np.abs(published).max()
    )


@pytest.mark.parametrize("ordered", [False, True])
def test_factor_is_that_of_the_damped_hessian_in_order(ordered):
    h = hessian()
    order = np.random.default_rng(1).permutation(len(h)) if ordered else None
    found = factorize(jnp.asarray(h), 0.01, None if order is None else jnp.array(order))
    expected = damped(h, 0.01) / np.diag(h).mean()
    if order is not None:
        expected = expected[order][:, order]
    upper = np.asarray(found.upper, np.float64)
    np.testing.assert_allclose(upper @ upper.T, expected, atol=1e-4)
    np.testing.assert_allclose(found.unit * np.diag(h).mean(), 1, rtol=1e-5)
    assert found.fraction == np.float32(0.01) and not found.diagonal


def test_damping_climbs_only_as_far_as_it_must():
    basis, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(64, 64)))
    for lowest, fraction in ((0.001, 0.01), (-0.05, 0.1), (-0.5, 1), (-5, 10)):
        values = np.linspace(1, 2, 64)
        values[0] = lowest * values.mean()
        h = jnp.asarray((basis * values) @ basis.T, jnp.float32)
        found = factorize(h, 0.01)
        assert not found.diagonal
        np.testing.assert_allclose(found.fraction, fraction, rtol=1e-6)


def broken(kind):
    h = hessian()
    if kind == "indefinite":
        return h - 1000 * np.diag(h).mean() * np.ones_like(h)
    h[3, 5] = {"nan": np.nan, "inf": np.inf}[kind]
    return h


@pytest.mark.parametrize("kind", ["nan", "inf", "indefinite"])
def test_what_no_damping_mends_counts_as_uncorrelated(kind):
    found = factorize(jnp.asarray(broken(kind)), 0.01)
    assert found.diagonal
    np.testing.assert_array_equal(found.upper, np.eye(96))
    np.testing.assert_allclose(found.fraction, 10, rtol=1e-6)


@pytest.mark.parametrize("samples", [1, 20])
def test_fewer_samples_than_features_are_enough(samples):
    found = factorize(jnp.asarray(hessian(samples)), 0.01)
    assert not found.diagonal and np.isfinite(found.upper).all()


def test_dead_features_take_the_mean_diagonal_and_no_part_in_it():
    h = hessian()
    h[[4, 9]] = 0
    h[:, [4, 9]] = 0
    assert np.flatnonzero(dead_features(jnp.asarray(h))).tolist() == [4, 9]
    upper = np.asarray(factorize(jnp.asarray(h), 0.01).upper)
    rest = np.delete(np.arange(96), [4, 9])
    alone = factorize(jnp.asarray(h[rest][:, rest]), 0.01).upper
    np.testing.assert_allclose(upper[rest][:, rest], alone, atol=1e-6)
    np.testing.assert_allclose(np.diag(upper)[[4, 9]], np.sqrt(1.01), rtol=1e-6)


def test_no_sample_at_all():
    found = factorize(jnp.zeros((8, 8)), 0.01)
    assert not found.diagonal
    np.testing.assert_allclose(found.upper, np.sqrt(1.01) * np.eye(8), rtol=1e-6)


@pytest.mark.parametrize("size", [2.0**-100, 2.0**100])
def test_size_of_the_inputs_does_not_matter(size):
    h = hessian()
    ours = factorize(jnp.asarray(h * np.float32(size)), 0.01).upper
    np.testing.assert_allclose(ours, factorize(jnp.asarray(h), 0.01).upper, atol=1e-6)


def test_solve():
    h = hessian()
    b = np.random.default_rng(2).normal(size=(96, 5)).astype(np.float32)
    found = factorize(jnp.asarray(h), 1.0)
    expected = np.linalg.solve(damped(h, 1.0) / np.diag(h).mean(), b)
    np.testing.assert_allclose(solve(found.upper, jnp.asarray(b)), expected, atol=1e-4)


def test_drift_is_made_up_for_by_least_squares_over_the_features_after_it():
    rng = np.random.default_rng(3)
    K, N = 24, 4
    x = inputs(200, K)
    full = x + 0.3 * inputs(200, K, 5)
    w = rng.normal(size=(K, N))
    h = x.T @ x / 200
    factor = factorize(jnp.asarray(h, jnp.float32), 0.01)
    cross = (full - x).T @ x / 200
    found = drift_target(
        factor.upper,
        jnp.asarray(cross, jnp.float32) * factor.unit,
        jnp.asarray(w, jnp.float32),
    )
    ridge = np.sqrt(200 * 0.01 * np.diag(h).mean()) * np.eye(K)
    expected = np.zeros((K, N))
    for q in range(K - 1):
        wanted = np.outer(np.append(full[:, q] - x[:, q], np.zeros(K)), w[q])
        after = np.concatenate((x, ridge))[:, q + 1 :]
        expected[q + 1 :] += np.linalg.lstsq(after, wanted, rcond=None)[0]
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def test_maps_over_experts():
    h = np.stack([hessian(seed=seed) for seed in range(2)] + [broken("nan")])
    many = jax.vmap(lambda h: factorize(h, 0.01))(jnp.asarray(h))
    assert many.diagonal.tolist() == [False, False, True]
    np.testing.assert_allclose(
        many.upper[1], factorize(jnp.asarray(h[1]), 0.01).upper, atol=1e-5
    )
