"""Hadamard matrices of sizes that models have."""

import jax
import numpy as np
import pytest
import scipy.linalg

from qjax.core.hadamard import small_factor, small_hadamard
from qjax.core.transforms import walsh_hadamard

SIZES = {4096: 1, 768: 12, 2560: 20, 14336: 28, 9728: 76, 25600: 200, 18944: 148}


@pytest.mark.parametrize("size", SIZES)
def test_sizes_of_models_have_a_small_factor(size):
    m = small_factor(size)
    assert m == SIZES[size]
    factor = small_hadamard(m).astype(np.int64)
    np.testing.assert_array_equal(factor @ factor.T, m * np.eye(m))
    np.testing.assert_array_equal(factor, factor.T)
    assert (np.abs(factor) == 1).all()


@pytest.mark.parametrize("size", [1, 64, 48, 80, 56])
def test_the_transform_is_the_kronecker_product(size):
    m = small_factor(size)
    matrix = np.kron(small_hadamard(m), scipy.linalg.hadamard(size // m)) / size**0.5
    x = jax.random.normal(jax.random.key(0), (3, size))
    y = walsh_hadamard(x)
    np.testing.assert_allclose(y, np.asarray(x, np.float64) @ matrix, atol=1e-5)
    np.testing.assert_allclose(walsh_hadamard(y), x, atol=1e-5)


@pytest.mark.parametrize("size", [0, 6, 18, 172])
def test_other_sizes_are_refused(size):
    with pytest.raises(ValueError, match=rf"power of two, alone or .*, got {size}"):
        small_factor(size)
