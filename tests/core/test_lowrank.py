"""Low-rank factors against closed forms in numpy's double precision."""

import jax.numpy as jnp
import numpy as np
import pytest

from qjax.core.coded import Coded
from qjax.core.formats import Codebook, Int, channel
from qjax.core.lowrank import (
    best_for_features,
    best_for_outputs,
    best_rank,
    coded_and_best_rank,
    kept,
)

K, N, R = 24, 16, 3
RNG = np.random.default_rng(0)
E = jnp.asarray(RNG.normal(size=(K, N)), jnp.float32)
X = RNG.normal(size=(200, K)) * np.exp(RNG.normal(size=K))
C = X.T @ X / len(X)


def product(factors):
    left, right = (np.asarray(each, np.float64) for each in factors)
    return left @ right


def truncated(matrix):
    u, s, v = np.linalg.svd(np.float64(matrix), full_matrices=False)
    return (u[:, :R] * s[:R]) @ v[:R]


def test_best_rank_is_the_truncated_decomposition():
    found = best_rank(E, R)
    np.testing.assert_allclose(product(found), truncated(E), atol=1e-5)
    left, right = found  # with the roots of the singular values in both
    np.testing.assert_allclose(
        np.linalg.norm(left, axis=0), np.linalg.norm(right, axis=1), rtol=1e-5
    )
    stacked = best_rank(jnp.stack([E, 2 * E]), R)
    np.testing.assert_allclose(stacked[0][0] @ stacked[1][0], product(found), atol=1e-5)


def test_factors_for_features_and_for_outputs():
    sizes = jnp.asarray(np.abs(X).mean(0), jnp.float32)
    found = best_for_features(E, sizes, R)
    expected = truncated(sizes[:, None] * E) / sizes[:, None]
    np.testing.assert_allclose(product(found), expected, atol=1e-4)
    values, vectors = np.linalg.eigh(C)
    root = (vectors * np.sqrt(values)) @ vectors.T
    expected = np.linalg.solve(root, truncated(root @ E))
    found = best_for_outputs(E, jnp.asarray(C, jnp.float32), R)
    np.testing.assert_allclose(product(found), expected, atol=1e-3)


def test_features_that_are_never_used_leave_finite_factors():
    used = jnp.arange(K) >= 5
    sizes = jnp.asarray(np.abs(X).mean(0), jnp.float32) * used
    moments = jnp.asarray(C, jnp.float32) * used * used[:, None]
    for factors in (
        best_for_outputs(E, moments, R),
        best_for_outputs(E, 0 * moments, R),
        best_for_features(E, sizes, R),
        best_for_features(E, 0 * sizes, R),
    ):
        assert np.isfinite(product(factors)).all()


def test_turns_are_those_of_algorithm_1():
    """Each turn in numpy from the codes that were found before it."""
    format = Codebook("nf4")
    error = []
    for iters in (1, 2, 5):
        coded, *factors = coded_and_best_rank(E, format, R, iters)
        rest = np.float64(E) - np.float64(coded.decode())
        np.testing.assert_allclose(product(factors), truncated(rest), atol=1e-5)
        error.append(np.linalg.norm(rest - product(factors)))
    assert error[0] > error[-1]


def test_more_rank_than_there_is():
    with pytest.raises(ValueError, match="rank 17 is more than a matrix of 24 x 16"):
        best_rank(E, 17)


def test_factors_are_stored_in_the_type_of_the_weight():
    assert kept(E, None, "bfloat16").dtype == "bfloat16"
    coded = kept(E, Int(8, channel()), "bfloat16")
    assert isinstance(coded, Coded) and coded.scale.dtype == "bfloat16"
    assert kept(E, Int(8, channel()), "float32").format == Int(8, channel())
