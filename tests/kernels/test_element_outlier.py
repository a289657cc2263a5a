"""Outlier weights, simulated strictly, against a dense matrix in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax_kernels.element_outlier import pack, reference

SHAPES = {"whole": (1152, 256, 400), "cut": (200, 130, 60), "none": (128, 128, 0)}


def drawn(name):
    """Entries with zeros among them and two at one place, and `S` in float64."""
    K, N, count = SHAPES[name]
    draw = np.random.default_rng(0)
    rows, cols = draw.integers(0, K, count), draw.integers(0, N, count)
    if count:
        rows[1], cols[1] = rows[0], cols[0]
    values = jnp.asarray(
        draw.normal(size=count) * 10.0 ** draw.integers(-30, 30, count)
    )
    values = np.array(values.astype(jnp.bfloat16).astype(jnp.float32))
    values[5:9] = 0
    S = np.zeros((K, N))
    np.add.at(S, (rows, cols), values.astype(np.float64))
    return pack(values, rows, cols, (K, N)), S


@pytest.mark.parametrize("name", SHAPES)
def test_equals_float64(name, backend):
    elements, S = drawn(name)
    x = jax.random.normal(jax.random.key(0), (9, S.shape[0]), jnp.bfloat16)
    y = backend.run("element_outlier", x, elements, dtype=jnp.float32)
    x = np.asarray(x, np.float64)
    assert (np.abs(y - x @ S) <= 2.0**-20 * (np.abs(x) @ np.abs(S))).all()


@pytest.mark.parametrize("name", SHAPES)
def test_the_tiles_are_the_matrix(name):
    elements, S = drawn(name)
    np.testing.assert_allclose(reference.dense(elements), S, rtol=1e-6)
    x = jax.random.normal(jax.random.key(0), (3, S.shape[0]))
    y = reference.element_outlier(x, elements)
    held = np.abs(np.asarray(x, np.float64)) @ np.abs(S)
    assert (np.abs(y - np.asarray(x, np.float64) @ S) <= 2.0**-20 * held).all()


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"an outlier is at \(200, 3\)"):
        pack([1.0], [200], [3], (128, 128))
    with pytest.raises(ValueError, match="not finite in bfloat16"):
        pack([np.inf], [2], [3], (128, 128))
    with pytest.raises(
        ValueError, match=r"x has shape \(2, 5\); it must be \(M, 128\)"
    ):
        reference.element_outlier(jnp.ones((2, 5)), drawn("none")[0])
