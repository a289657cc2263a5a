"""IMatrix: the factor of least weighted error, found by trying each in numpy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.core.formats import MSE, MX, NVFP4, Binary, Codebook, Int, group
from qjax.methods import RTN
from qjax.methods.base import Calibrated
from qjax.methods.imatrix import IMatrix

K, N = 128, 32
RNG = np.random.default_rng(0)
W = (RNG.standard_t(5, (K, N)) * 0.02).astype(np.float32)
MOMENT = np.exp(2 * RNG.normal(size=K)).astype(np.float32)
# Small matrices: compiling takes far longer than running.
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@partial(jit, static_argnums=0)
def solve(method, moment, w):
    with jax.numpy_dtype_promotion("strict"):
        found = method.solve_site(w, {"second_moment": moment})
        return found.parts[0].decode(jnp.float32), found.parts[0].scale, found.notes


@partial(jit, static_argnums=0)
def nearest(format, w):
    return RTN(weights=format).solve(w)[0].decode(jnp.float32)


def weighted(q):
    return np.sum(MOMENT[:, None] * np.square(W.astype(np.float64) - np.asarray(q)))


def test_scales_are_those_of_least_weighted_error():
    _, scale, _ = solve(IMatrix(weights=Int(3, group(32))), MOMENT, W)
    w = W.reshape(4, 32, N).astype(np.float64)
    importance = MOMENT.reshape(4, 32, 1)
    whole = np.abs(w).max(1, keepdims=True) / 3.5
    least, best = np.full((4, N), np.inf), np.zeros((4, N))
    for i in range(19):
        s = whole * (1 - i / 20)
        d = np.abs(w - np.clip(np.round(w / s), -4, 3) * s)
        error = (importance * d**3).sum(1)
        best = np.where(error < least, s[:, 0], best)
        least = np.minimum(error, least)
    close = np.isclose(scale, best, rtol=1e-5)
    assert close.mean() >= 0.99  # two factors may differ by less than float32 tells


@pytest.mark.parametrize(
    "format", [Int(4, group(32), zero="int"), MX("fp4"), NVFP4(), Codebook("nf4")]
)
def test_weighted_error_falls_below_round_to_nearest(format):
    q, _, _ = solve(IMatrix(weights=format, search=MSE(norm=2.0)), MOMENT, W)
    assert weighted(q) < weighted(nearest(format, W))


def test_size_of_the_moments_does_not_matter():
    method = IMatrix(weights=Int(4, group(32)))
    q = [solve(method, MOMENT * np.float32(size), W)[0] for size in (1, 2.0**100)]
    np.testing.assert_array_equal(q[0], q[1])


@pytest.mark.parametrize("value", [np.nan, np.inf, 0])
def test_moments_that_say_nothing_leave_round_to_nearest(value):
    format = Int(4, group(32))
    q, _, notes = solve(IMatrix(weights=format), np.full(K, value, np.float32), W)
    np.testing.assert_array_equal(q, nearest(format, W))
    assert notes["dead"] == (K if value == 0 else 0)


def test_defaults_are_those_of_the_peer():
    method = IMatrix()
    assert method.format == Int(4, group(128))
    assert method.search == MSE(norm=3.0, grid=20, maxshrink=0.95)
    assert isinstance(method, Calibrated) and not method.full_precision


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weights": Binary()}, "IMatrix cannot search binary"),
        ({"scheme": "W4A16", "weights": Int(4)}, "IMatrix.scheme"),
        ({"scheme": "W4A61"}, "unknown scheme"),
    ],
)
def test_bad_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        IMatrix(**fields)
