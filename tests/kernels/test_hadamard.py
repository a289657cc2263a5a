"""The Hadamard transform, simulated strictly, against scipy's matrices in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from qjax.core.hadamard import small_hadamard
from qjax_kernels.hadamard import reference
from qjax_kernels.hadamard.butterflies import across
from qjax_kernels.hadamard.pallas_tpu import unfit

CASES = {
    "512": (512, 1, False, jnp.bfloat16),
    "512 signed": (512, 1, True, jnp.float32),
    "12 x 128": (1536, 12, True, jnp.bfloat16),
}


def drawn(K, m, signed, dtype, M=20):
    x = jax.random.normal(jax.random.key(0), (M, K), dtype)
    x = x.at[0].set(0).at[1].mul(1e-30).at[2].mul(1e30)
    draw = np.random.default_rng(0)
    signs = draw.choice([-1.0, 1.0], K).astype(np.float32) if signed else None
    matrix = np.kron(small_hadamard(m), scipy.linalg.hadamard(K // m)) / K**0.5
    wide = np.asarray(x, np.float64)
    true = (wide if signs is None else wide * signs) @ matrix
    size = np.linalg.norm(wide, axis=1, keepdims=True)
    return x, None if signs is None else jnp.asarray(signs), true, size


@pytest.mark.parametrize("m", [1, 12])
def test_butterflies_are_the_matrix(m):
    parts = np.random.default_rng(0).normal(size=(m * 8, 5))
    matrix = np.kron(small_hadamard(m), scipy.linalg.hadamard(8))
    found = np.stack(across(list(parts), small_hadamard(m)))
    np.testing.assert_allclose(found, matrix.T @ parts, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_equals_scipy(name, backend):
    x, signs, true, size = drawn(*CASES[name])
    m = CASES[name][1]
    group = {"tokens": 16, "group": 16}
    y = backend.run("hadamard", x, signs, factor=small_hadamard(m), tpu=group)
    assert y.dtype == x.dtype
    y = np.asarray(y, np.float64)
    # Sums in float32 are off by a share of the token's length, results by one rounding.
    last = 2.0**-8 if x.dtype == jnp.bfloat16 else 2.0**-23
    assert (np.abs(y - true) <= last * np.abs(true) + 2.0**-21 * size).all()


@pytest.mark.parametrize("name", ["512", "12 x 128"])
def test_codes_are_the_nearest(name, backend):
    x, signs, true, size = drawn(*CASES[name])
    m = CASES[name][1]
    codes, scale = backend.run(
        "hadamard", x, signs, factor=small_hadamard(m), int8=True,
        tpu={"tokens": 32, "group": 32},
    )  # fmt: skip
    scale = np.asarray(scale, np.float64)
    largest = np.abs(true).max(1, keepdims=True)
    off = 2.0**-20 * size
    assert (np.abs(scale - largest / 127.5)[1:] <= off[1:]).all()
    assert np.isfinite(scale).all() and (np.asarray(codes[0]) == 0).all()
    # The largest positive number would round to 128, which int8 lacks.
    error = np.abs(np.asarray(codes, np.float64) * scale - true)
    near = np.where(true / scale > 127, 0.5001, 0.5) * scale
    assert (error <= near + off).all()


def test_the_reference_equals_scipy():
    x, signs, true, size = drawn(*CASES["12 x 128"])
    factor = small_hadamard(12)
    y = reference.hadamard(x.astype(jnp.float32), signs, factor=factor)
    assert (np.abs(np.asarray(y, np.float64) - true) <= 2.0**-20 * size).all()
    codes, scale = reference.hadamard(x, signs, factor=factor, int8=True)
    near = 0.5001 * np.asarray(scale, np.float64)
    error = np.abs(np.asarray(codes, np.float64) * scale - true)
    assert (error <= near + 2.0**-20 * size).all()


def test_what_does_not_suit_is_named():
    shape = jax.ShapeDtypeStruct
    assert "96 features" in unfit(
        "v5e", shape((4, 96), jnp.bfloat16), small_hadamard(12)
    )
    assert "x is float16" in unfit("v5e", shape((4, 512), jnp.float16))
    assert "VMEM; v7x has 64" in unfit("v7x", shape((4, 2**18), jnp.float32))
    with pytest.raises(ValueError, match="a power of two times as many"):
        unfit("v5e", shape((4, 96), jnp.bfloat16))
