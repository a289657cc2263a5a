"""LLM.int8(): the codes and outputs of bitsandbytes, and its claim on outliers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.core.coded import encode
from qjax.methods.base import DataFree
from qjax.methods.llm_int8 import LLMInt8
from qjax.ops.activations import code_input
from qjax.ops.outliers import split_outliers
from qjax.quantize import quantize
from qjax.trace.apply import apply

K, N, M = 64, 32, 12
RNG = np.random.default_rng(0)
W = RNG.normal(size=(K, N)).astype(np.float32)
CALM = np.clip(RNG.normal(size=(M, K)), -5, 5).astype(np.float32)
CALM[:, ::3] = CALM[:, ::3].astype(np.float16)  # many lie half way between two codes
CALM[:, 1] = CALM.max(1) / 2


def with_outliers(size=40.0):
    """Features 5 and 40 are outliers in every token, as in the paper's models."""
    x = CALM.copy()
    x[:, [5, 40]] = size * np.sign(x[:, [5, 40]])
    return x


def linear(params, x):
    return x @ params["w"]


def run(x, threshold=6.0, w=W):
    method = LLMInt8(threshold)
    q = quantize(linear, {"w": jnp.asarray(w)}, method, example=(x,), progress=False)
    return apply(linear)(q, x), q["w"]


def reference():
    pytest.importorskip("torch")
    pytest.importorskip("bitsandbytes")
    import torch
    from bitsandbytes import functional

    return torch, functional


def half(array, torch):
    return torch.from_numpy(array.copy()).half()


def test_weight_codes_are_those_of_bitsandbytes():
    torch, functional = reference()
    codes, absmax, _ = functional.int8_vectorwise_quant(half(W.T, torch))
    coded = LLMInt8().solve(jnp.asarray(W))[0]
    np.testing.assert_array_equal(np.asarray(coded.codes).T, codes.numpy())
    np.testing.assert_allclose(coded.scale[0], absmax.numpy() / 127, rtol=1e-6)


def test_activation_codes_are_those_of_bitsandbytes():
    torch, functional = reference()
    x = with_outliers()
    codes, absmax, features = functional.int8_vectorwise_quant(half(x, torch), 6.0)
    _, q = run(jnp.asarray(x))
    rest, kept, acts = split_outliers(jnp.asarray(x), q.site(0))
    coded = code_input(rest, acts)
    np.testing.assert_array_equal(np.flatnonzero(np.asarray(kept).any(0)), features)
    own = np.asarray(coded.codes, np.int32).T - 128
    np.testing.assert_array_equal(own, codes.numpy())
    np.testing.assert_allclose(coded.grid.scale[0], absmax.numpy() / 127, rtol=1e-6)


def test_outputs_are_those_of_bitsandbytes():
    torch, functional = reference()
    import bitsandbytes

    x = with_outliers()
    state = bitsandbytes.MatmulLtState()
    state.threshold, state.has_fp16_weights = 6.0, False
    state.CB, state.SCB, _ = functional.int8_vectorwise_quant(half(W.T, torch))
    want = bitsandbytes.matmul(half(x, torch), half(W.T, torch), state=state)
    got = np.asarray(run(jnp.asarray(x))[0])
    # The reference rounds the weights beside the outliers and the sums to float16.
    slack = 2**-9 * np.abs(x).max() * np.abs(W).max()
    np.testing.assert_allclose(got, want.float().numpy(), rtol=2**-9, atol=slack)


def test_small_values_of_an_outlier_feature_widen_the_scale_as_in_bitsandbytes():
    torch, functional = reference()
    x = CALM.copy() / 10
    x[:, 5] = 5.0
    x[0, 5] = 40.0
    x = x.astype(np.float16).astype(np.float32)
    codes, absmax, _ = functional.int8_vectorwise_quant(half(x, torch), 6.0)
    _, q = run(jnp.asarray(x))
    rest, _, acts = split_outliers(jnp.asarray(x), q.site(0))
    coded = code_input(rest, acts)
    own = np.asarray(coded.codes, np.int32).T - 128
    np.testing.assert_array_equal(own, codes.numpy())
    np.testing.assert_allclose(coded.grid.scale[0], absmax.numpy() / 127, rtol=1e-6)
    assert absmax[1] == 5.0 and absmax[0] < 1


@pytest.mark.parametrize("size", [30.0, 60.0, 100.0])
def test_outliers_cost_nothing_where_plain_w8a8_fails(size):
    """The paper's central claim, on features of 30 to 100 times the usual size.

    They stand for a float layer: what the features gain, their weights lose. The 8-bit
    weights' own error, which every W8 method has, is told apart.
    """
    x, w = CALM.copy(), W.copy()
    x[:, [5, 40]] = size * np.sign(x[:, [5, 40]])
    w[[5, 40]] /= size
    exact = x.astype(np.float64) @ w.astype(np.float64)
    decoded = np.asarray(LLMInt8().solve(jnp.asarray(w))[0].decode(), np.float64)
    kept, plain = (np.asarray(run(jnp.asarray(x), t, w)[0]) for t in (6.0, 0))

    def distance(a, b):
        return np.linalg.norm(a - b) / np.linalg.norm(exact)

    assert distance(kept, x @ decoded) < 0.01
    assert distance(kept, x @ decoded) < distance(plain, x @ decoded) / (size / 3)
    assert distance(kept, exact) < 1.05 * distance(x @ decoded, exact)


def test_threshold_zero_is_plain_vectorwise_w8a8():
    x = with_outliers()
    got, q = run(jnp.asarray(x), threshold=0)
    assert q.site(0).activation.outliers is None
    codes = []
    for a, axis in ((x, 1), (W, 0)):
        a = a.astype(np.float16).astype(np.float32)
        scale = np.abs(a).max(axis, keepdims=True) / np.float32(127)
        codes.append((np.round(a / scale), scale))
    want = (codes[0][0] @ codes[1][0]) * codes[0][1] * codes[1][1]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-3)


def test_it_is_a_method_without_data():
    method = LLMInt8()
    assert isinstance(method, DataFree)
    assert method.activation.outliers == 6.0 and not method.random
    assert hash(method) == hash(LLMInt8(6.0))
    w = jnp.asarray(W)
    jitted, eager = jax.jit(method.solve)(w)[0], encode(w, method.format)
    np.testing.assert_array_equal(jitted.codes, eager.codes)


BAD = [
    ({"threshold": -1.0}, "LLMInt8.threshold must be a number >= 0, got -1.0"),
    ({"threshold": float("nan")}, "LLMInt8.threshold"),
    ({"threshold": True}, "LLMInt8.threshold"),
]


@pytest.mark.parametrize(("fields", "message"), BAD)
def test_bad_fields_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        LLMInt8(**fields)
