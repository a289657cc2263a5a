"""Sequential MSE against trying every candidate in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.core.formats import (
    MX,
    NVFP4,
    Codebook,
    Float,
    Int,
    Ternary,
    block,
    channel,
    group,
    tensor,
)
from qjax.methods import RTN
from qjax.methods.base import Calibrated
from qjax.methods.sequential_mse import SequentialMSE

K, N = 96, 24
RNG = np.random.default_rng(0)
W = (RNG.standard_t(5, (K, N)) * 0.02).astype(np.float32)
X = RNG.normal(size=(300, K)) @ RNG.normal(size=(K, K)) * np.exp(RNG.normal(size=K))
H = (X.T @ X / 300).astype(np.float32)
# Small matrices: compiling takes far longer than running.
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@partial(jit, static_argnums=0)
def solve(method, h, w):
    with jax.numpy_dtype_promotion("strict"):
        found = method.solve_site(w, {"hessian": h})
        return found.parts[0].decode(jnp.float32), found.parts[0].scale, found.notes


@partial(jit, static_argnums=0)
def nearest(format, w):
    return RTN(weights=format).solve(w)[0].decode(jnp.float32)


def error(q):
    """Of each column."""
    d = W.astype(np.float64) - np.asarray(q)
    return np.sum(d * (H.astype(np.float64) @ d), 0)


def test_channels_take_the_candidate_of_least_output_error():
    _, scale, _ = solve(SequentialMSE(weights=Int(3, channel())), H, W)
    whole = np.abs(W.astype(np.float64)).max(0) / 3.5
    tried = []
    for k in range(20):
        s = whole * (k + 1) / 20
        tried.append(error(np.clip(np.round(W / s), -4, 3) * s))
    best = whole * (np.argmin(tried, 0) + 1) / 20
    np.testing.assert_allclose(scale[0], best, rtol=1e-5)


@pytest.mark.parametrize(
    "format",
    [
        Int(3, group(36), zero="int"),
        Int(4, block(32, 8)),
        Int(4, tensor()),
        Codebook("nf4", granularity=group(32)),
        Float("e4m3"),
        MX("fp4"),
    ],
    ids=lambda format: format.name,
)
def test_output_error_falls_below_round_to_nearest(format):
    q, _, _ = solve(SequentialMSE(weights=format), H, W)
    ours, rtn = error(q), error(nearest(format, W))
    assert ours.sum() < rtn.sum()
    if format.granularity.cols == 1:
        assert (ours <= rtn * (1 + 1e-4)).all()


@pytest.mark.parametrize("value", [np.nan, 0])
def test_a_hessian_that_says_nothing_leaves_round_to_nearest(value):
    format = Int(3, channel())
    h = np.full((K, K), value, np.float32)
    q, _, notes = solve(SequentialMSE(weights=format), h, W)
    np.testing.assert_array_equal(q, nearest(format, W))
    assert notes["dead"] == (K if value == 0 else 0)


def test_size_of_the_hessian_does_not_matter():
    method = SequentialMSE(weights=Int(3, channel()))
    q = [solve(method, H * np.float32(size), W)[0] for size in (1, 2.0**100)]
    np.testing.assert_array_equal(q[0], q[1])


def test_scales_have_the_dtype_of_the_weights():
    method = SequentialMSE(weights=Int(3, channel()), candidates=2)
    _, scale, _ = solve(method, H, jnp.asarray(W, jnp.bfloat16))
    assert scale.dtype == jnp.bfloat16


def test_is_a_calibrated_method():
    assert isinstance(SequentialMSE(), Calibrated)
    assert SequentialMSE().shared
    assert not SequentialMSE(weights=Int(4, tensor())).shared


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"candidates": 0}, "SequentialMSE.candidates"),
        ({"weights": NVFP4()}, "SequentialMSE cannot choose ranges of nvfp4"),
        ({"weights": Ternary()}, "SequentialMSE cannot choose ranges of ternary"),
        ({"scheme": "W4A16", "weights": Int(4)}, "SequentialMSE.scheme"),
    ],
)
def test_bad_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        SequentialMSE(**fields)
