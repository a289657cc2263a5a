"""EETQ: the codes and scales of its reference arithmetic."""

import jax
import jax.numpy as jnp
import numpy as np

from qjax.core.formats import Int, channel
from qjax.methods.base import DataFree
from qjax.methods.eetq import EETQ
from qjax.quantize import quantize
from qjax.trace.apply import apply

K, N = 96, 40
W = np.random.default_rng(0).standard_t(4, (K, N)).astype(np.float32)
X = np.random.default_rng(1).normal(size=(7, K)).astype(np.float32)


def symmetric_quantize(w):
    """FasterTransformer's function: float32, C's round, clipping at both ends."""
    scale = np.abs(w).max(0) * np.float32(1 / 128)
    scaled = w / scale
    codes = np.trunc(scaled + np.copysign(np.float32(0.5), scaled))
    return np.clip(codes, -128, 127).astype(np.int8), scale


def test_codes_and_scales_are_those_of_the_reference():
    coded = jax.jit(EETQ().solve)(jnp.asarray(W))[0]
    codes, scale = symmetric_quantize(W)
    np.testing.assert_array_equal(coded.scale[0], scale)
    np.testing.assert_array_equal(coded.codes, codes)


def test_the_largest_weight_is_clipped_if_positive():
    w = jnp.asarray([[1.0, -1.0], [0.5, 0.25]])
    coded = EETQ().solve(w)[0]
    np.testing.assert_array_equal(coded.codes, [[127, -128], [64, 32]])
    np.testing.assert_array_equal(coded.decode()[0], [127 / 128, -1.0])


def test_experts_layers_and_zeros():
    w = jnp.asarray(np.stack([W, W * 3, np.zeros_like(W)]))
    stacked = EETQ().solve(w)[0]
    for e in range(3):
        one = EETQ().solve(w[e])[0]
        np.testing.assert_array_equal(stacked.codes[e], one.codes)
    assert not np.asarray(stacked.decode()[2]).any()


def test_bfloat16_weights_keep_bfloat16_scales(strict):
    w = jnp.asarray(W, jnp.bfloat16)
    coded = EETQ().solve(w)[0]
    assert coded.scale.dtype == jnp.bfloat16
    step = np.asarray(coded.scale, np.float32)
    error = np.abs(np.asarray(coded.decode()) - np.asarray(w, np.float32)) / step
    # Half a step, but for the largest weight of a column: one step, and as much as
    # rounding its scale to 8 bits of mantissa moves 128 of them.
    assert np.quantile(error, 0.98) <= 0.5 and error.max() <= 1.5


def test_a_linear_layer_with_float_activations():
    q = quantize(
        lambda p, x: x @ p["w"],
        {"w": jnp.asarray(W)},
        EETQ(),
        example=(jnp.asarray(X),),
        progress=False,
    )
    y = apply(lambda p, x: x @ p["w"])(q, jnp.asarray(X))
    codes, scale = symmetric_quantize(W)
    want = X.astype(np.float64) @ (codes * scale.astype(np.float64))
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-4)
    assert np.linalg.norm(want - X @ W) < 0.02 * np.linalg.norm(want)


def test_it_is_a_method_without_data():
    method = EETQ(ignore="head")
    assert isinstance(method, DataFree) and method.activation is None
    assert method.format == Int(8, channel()) and hash(method)
