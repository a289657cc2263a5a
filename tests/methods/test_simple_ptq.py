"""Simple PTQ: a scheme rounded to nearest; static ranges name their calibrator."""

import jax.numpy as jnp
import numpy as np
import pytest

from qjax.core.formats import MX, Float, tensor
from qjax.core.ranges import KLRange, MinMaxRange, MSERange, PercentileRange
from qjax.methods.base import DataFree
from qjax.methods.simple_ptq import SimplePTQ
from qjax.quantize import quantize
from qjax.trace.apply import apply

W = np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32)
X = np.random.default_rng(1).normal(size=(5, 64)).astype(np.float32)


def linear(params, x):
    return x @ params["w"]


def nearest(a, axis):
    scale = np.abs(a).max(axis, keepdims=True) / np.float32(127.5)
    return np.clip(np.round(a / scale), -128, 127), scale


def test_default_is_w8a8_in_integers():
    x = jnp.asarray(X)
    q = quantize(
        linear, {"w": jnp.asarray(W)}, SimplePTQ(), example=(x,), progress=False
    )
    (cx, sx), (cw, sw) = nearest(X, 1), nearest(W, 0)
    np.testing.assert_allclose(apply(linear)(q, x), cx @ cw * sx * sw, rtol=1e-5)


def test_static_schemes_carry_a_calibrator():
    method = SimplePTQ("FP8", calibrator=PercentileRange(99.9))
    assert method.activation is not None and not method.activation.dynamic
    assert method.activation.format == Float("e4m3", tensor())
    assert method.calibrator == PercentileRange(99.9)
    assert SimplePTQ("NVFP4").calibrator == MinMaxRange()
    assert SimplePTQ("MXFP4").format == MX("fp4", scale_rule="ct")


def test_weights_are_solved_without_data():
    method = SimplePTQ("NVFP4")
    assert isinstance(method, DataFree) and not method.random and hash(method)
    decoded = np.asarray(method.solve(jnp.asarray(W))[0].decode())
    assert np.linalg.norm(decoded - W) < 0.15 * np.linalg.norm(W)


BAD = [
    ({"scheme": "W8B8"}, ValueError, "unknown scheme 'W8B8'"),
    ({"calibrator": "minmax"}, TypeError, "SimplePTQ.calibrator must be"),
    ({"calibrator": None}, TypeError, "SimplePTQ.calibrator must be"),
    ({"scheme": "NVFP4", "calibrator": KLRange()}, ValueError, "KLRange cannot"),
    ({"scheme": "NVFP4", "calibrator": MSERange()}, ValueError, "MSERange cannot"),
    ({"targets": 3}, TypeError, "targets"),
]


@pytest.mark.parametrize(("fields", "kind", "message"), BAD)
def test_bad_fields_are_named(fields, kind, message):
    with pytest.raises(kind, match=message):
        SimplePTQ(**fields)
