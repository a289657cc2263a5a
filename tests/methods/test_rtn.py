"""RTN: the nearest point of its grid, and schemes with activations for real."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.core.formats import MSE, Granularity, Int, Percentile, group, token
from qjax.core.qtensor import Activation
from qjax.core.ranges import (
    KLRange,
    MinMaxRange,
    MovingAverageRange,
    calibrator_of,
)
from qjax.methods import RTN
from qjax.quantize import quantize
from qjax.trace.apply import apply

X = jnp.asarray(np.random.default_rng(0).normal(size=(5, 64)), jnp.float32)
W = jnp.asarray(np.random.default_rng(1).normal(size=(64, 32)), jnp.float32)


def linear(params, x):
    return x @ params["w"]


def dots(jaxpr):
    """Every dot_general below a jaxpr: operand dtypes and result dtype."""
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            found.append(tuple(str(v.aval.dtype) for v in (*eqn.invars, *eqn.outvars)))
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                found += dots(inner)
    return found


@pytest.mark.parametrize(
    ("scheme", "operands", "result"),
    [
        ("W8A8", "int8", "int32"),
        ("FP8_DYNAMIC", "float8_e4m3fn", "float32"),
    ],
)
def test_activations_and_weights_are_contracted_in_low_bits(scheme, operands, result):
    q = quantize(linear, {"w": W}, RTN(scheme), example=(X,), progress=False)
    traced = jax.make_jaxpr(apply(linear))(q, X)
    assert dots(traced.jaxpr) == [(operands, operands, result)]


def test_w8a8_is_the_integer_product_of_the_codes():
    q = quantize(linear, {"w": W}, RTN("W8A8"), example=(X,), progress=False)
    codes, scales = [], []
    for a, axis in ((np.asarray(X), 1), (np.asarray(W), 0)):
        scale = np.abs(a).max(axis, keepdims=True) / np.float32(127.5)
        codes.append(np.clip(np.round(a / scale), -128, 127).astype(np.int32))
        scales.append(scale)
    expected = (codes[0] @ codes[1]) * scales[0] * scales[1]
    np.testing.assert_allclose(apply(linear)(q, X), expected, rtol=1e-5, atol=1e-5)


def test_every_weight_takes_the_nearest_level():
    coded = RTN("W4A16").solve(W)[0]
    levels = np.arange(-8, 8)[:, None] * np.asarray(coded.scale)
    nearest = np.abs(np.asarray(W)[:, None] - levels[None]).min(1)
    taken = np.abs(np.asarray(W) - np.asarray(coded.decode(jnp.float32)))
    np.testing.assert_allclose(taken, nearest, atol=1e-6)


def test_stochastic_rounding_is_unbiased():
    method = RTN(weights=Int(4, group(32)), rounding="stochastic")
    decode = jax.jit(lambda key: method.solve(W, key)[0].decode(jnp.float32))
    keys = jax.random.split(jax.random.key(0), 400)
    mean = np.mean([np.asarray(decode(k)) for k in keys], axis=0)
    scale = np.repeat(np.asarray(method.solve(W, keys[0])[0].scale), 32, 0)
    inside = np.asarray(W) < 7 * scale  # the largest code clips what is above
    error = (mean - np.asarray(W))[inside] / scale[inside]
    # Standard error of a mean of 400: at most 0.5 / 20 of a step; 5 of those.
    assert np.abs(error).max() < 0.125


@pytest.mark.parametrize("search", [MSE(), Percentile(99.0)])
def test_search_reaches_the_format(search):
    method = RTN(weights=Int(2, group(64)), search=search)
    plain = RTN(weights=Int(2, group(64)))
    assert (method.solve(W)[0].scale < plain.solve(W)[0].scale).any()


def test_default_is_w4a16():
    assert RTN().format == Int(4, group(128))


def test_static_schemes_take_a_calibrator_or_the_default():
    method = RTN("FP8")
    assert method.activation is not None and not method.activation.dynamic
    assert calibrator_of(method) == MinMaxRange()
    mean = MovingAverageRange(0.1)
    assert calibrator_of(RTN("NVFP4", calibrator=mean)) == mean
    per_feature = Activation(Int(8, Granularity(1, None)), dynamic=False)
    own = RTN(weights=Int(8), activations=per_feature, calibrator=KLRange())
    assert calibrator_of(own) == KLRange()
    assert calibrator_of(RTN("W8A8")) is None


def test_a_static_range_for_each_token_is_refused():
    tokens = Activation(Int(8, token()), dynamic=False)
    with pytest.raises(ValueError, match="its scales belong to single tokens"):
        RTN(weights=Int(8), activations=tokens)
