"""Outlier features in float beside int8: equation 8 of LLM.int8(), at dot sites."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from qjax.core.coded import encode
from qjax.core.formats import NVFP4, Additive, Float, Int, channel, group, token
from qjax.core.layout import Layout
from qjax.core.qtensor import Activation, QTensor, SiteActs
from qjax.io import treespec
from qjax.io.checkpoint import restore, save
from qjax.ops import Target, conv, how, matmul, ragged_matmul
from qjax.ops.kernels import choices
from qjax.trace import apply
from qjax_kernels.compat import interpret_params

K, N, M = 48, 12, 10
INT8 = Int(8, token(), scale_rule="narrow")
KEEPS = Activation(INT8, outliers=6.0)
RNG = np.random.default_rng(0)
W = jnp.asarray(RNG.normal(size=(K, N)), jnp.float32)
CALM = np.clip(RNG.normal(size=(M, K)), -5, 5).astype(np.float32)


def spiky(*features, size=40.0):
    x = CALM.copy()
    x[:, features] *= size
    x[0, features] = size  # at least one value beyond the threshold in each
    return jnp.asarray(x)


def quantized(w=W, weights=None, activation=KEEPS, roles="kn"):
    sizes = tuple(0 if r == "b" else s for r, s in zip(roles, w.shape))
    coded = encode(w, weights or Int(8, channel(), scale_rule="narrow"))
    acts = (SiteActs(activation=activation),)
    return QTensor.of(coded, Layout(roles, sizes), w.dtype, acts)


def equation_8(x, w):
    """In float64, from the weights that the codes stand for."""
    x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
    outlier = (np.abs(x) >= 6).any(-2, keepdims=True)
    rest = np.where(outlier, 0, x)
    scale = np.abs(np.where(np.abs(x) >= 6, 0, x)).max(-1, keepdims=True) / 127
    return np.where(outlier, x, 0) @ w + np.round(rest / scale) * scale @ w


@pytest.mark.parametrize("features", [(), (3,), (1, 7, 40)])
def test_matmul_is_equation_8(features):
    q, x = quantized(), spiky(*features) if features else jnp.asarray(CALM)
    want = equation_8(x, q.dequantize())
    np.testing.assert_allclose(matmul(x, q), want, rtol=1e-4, atol=2e-3)


def test_the_kernel_is_equation_8():
    """On a TPU's kernel, and with the gradient of XLA's form."""
    w = RNG.normal(size=(256, 128)).astype(np.float32)
    x = np.clip(RNG.normal(size=(M, 256)), -5, 5)
    x[::2, [3, 200]] *= 40
    x, q = jnp.asarray(x, jnp.bfloat16), quantized(jnp.asarray(w))
    target = Target("tpu", "v5e")

    def run(x, implementation, target):
        return matmul(
            x, q, implementation=implementation, target=target, dtype=jnp.float32,
            weight_dtype=jnp.bfloat16,
        )  # fmt: skip

    pltpu.reset_tpu_interpret_mode_state()
    with pltpu.force_tpu_interpret_mode(interpret_params()):
        y, pull = jax.vjp(lambda x: run(x, "pallas", target), x)
    size = np.abs(np.asarray(x, np.float64)) @ np.abs(np.asarray(q.dequantize()))
    by_xla, pull_xla = jax.vjp(lambda x: run(x, "xla", Target("cpu")), x)
    # XLA's form rounds decoded weights to bfloat16 where they meet outliers.
    assert (np.abs(y - by_xla) <= 2.0**-8 * size).all()
    seed = jnp.ones_like(y)
    np.testing.assert_array_equal(pull(seed)[0], pull_xla(seed)[0])
    (choice,) = choices(q, 0, x.astype(jnp.float32), "auto", target)
    assert "keeps outliers in bfloat16" in choice.refused


def test_the_rest_meets_int8_in_int32():
    text = str(jax.make_jaxpr(matmul)(spiky(3), quantized()))
    assert "preferred_element_type=int32" in text
    assert how(quantized()).endswith("in int32, features from 6 on in float")


def test_shapes_are_static():
    q, f = quantized(), jax.jit(matmul)
    for features in ((2,), (5, 6, 7)):
        f(spiky(*features), q)
    f(jnp.asarray(CALM), q)
    assert f._cache_size() == 1


def test_without_outliers_it_is_plain_w8a8():
    plain = quantized(activation=Activation(INT8))
    x = jnp.asarray(CALM)
    np.testing.assert_array_equal(matmul(x, quantized()), matmul(x, plain))


def test_the_threshold_itself_is_an_outlier():
    x = CALM.copy()
    x[2, 5] = 6.0
    plain = matmul(jnp.asarray(x), quantized(activation=Activation(INT8)))
    kept = matmul(jnp.asarray(x), quantized())
    want = equation_8(x, quantized().dequantize())
    np.testing.assert_allclose(kept, want, rtol=1e-4, atol=2e-3)
    assert np.abs(plain - want).max() > 1e-2


def test_outliers_of_thirty_to_a_hundred_times_cost_nothing():
    x = np.array(spiky(3, 17, size=30.0))
    x[:, 9] *= 100

    def error(x, activation):
        q = quantized(activation=activation)
        y = np.asarray(matmul(jnp.asarray(x), q), np.float64)
        return np.linalg.norm(y - x @ np.asarray(q.dequantize(), np.float64))

    assert error(x, KEEPS) < 1.1 * error(CALM, KEEPS)
    assert error(x, KEEPS) < error(x, Activation(INT8)) / 10


def test_experts_have_outliers_of_their_own():
    x = jnp.stack([spiky(1), jnp.asarray(CALM), spiky(20, 21)])
    w = jnp.asarray(RNG.normal(size=(3, K, N)), jnp.float32)
    q = quantized(w, roles="bkn")
    want = [equation_8(x[e], q.dequantize()[e]) for e in range(3)]
    np.testing.assert_allclose(matmul(x, q), want, rtol=1e-4, atol=2e-3)


@pytest.mark.parametrize(
    "weights", [Int(4, group(16)), Float("e4m3")], ids=["int4", "float8"]
)
def test_any_weight_format_may_be_beside(weights):
    q, x = quantized(weights=weights), spiky(3)
    want = equation_8(x, q.dequantize())
    np.testing.assert_allclose(matmul(x, q), want, rtol=1e-4, atol=2e-3)


def test_bfloat16_activations():
    x, q = spiky(3).astype(jnp.bfloat16), quantized(W.astype(jnp.bfloat16))
    y = matmul(x, q)
    assert y.dtype == jnp.bfloat16
    want = equation_8(x.astype(jnp.float32), q.dequantize(jnp.float32))
    assert np.abs(np.asarray(y, np.float64) - want).max() < 2**-7 * np.abs(want).max()


def test_gradients_are_those_of_the_values():
    q, x = quantized(), spiky(3, 11)
    cotangent = jnp.asarray(RNG.normal(size=(M, N)), jnp.float32)
    got = jax.vjp(lambda x: matmul(x, q), x)[1](cotangent)[0]
    np.testing.assert_allclose(got, cotangent @ q.dequantize().T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_stays_visible(bad):
    y = matmul(spiky(3).at[4, 30].set(bad), quantized())
    assert not np.isfinite(y[4]).any()
    others = np.delete(np.asarray(y), 4, axis=0)
    # An infinity makes its feature an outlier, and so leaves the other tokens alone.
    assert np.isfinite(others).all()


def test_ragged_and_convolution_sites_are_refused():
    experts = quantized(jnp.stack([W, W]), roles="bkn")
    with pytest.raises(ValueError, match=r"Activation.outliers is 6\.0, but only dot"):
        ragged_matmul(spiky(3), experts, jnp.array([4, 6]))
    axes = ("NHWC", "HWIO", "NHWC")
    numbers = jax.lax.conv_dimension_numbers((2, 6, 6, 3), (3, 3, 3, 4), axes)
    kernel = quantized(jnp.ones((27, 4)))
    params = {
        "window_strides": (1, 1),
        "padding": ((0, 0), (0, 0)),
        "dimension_numbers": numbers,
        "feature_group_count": 1,
        "batch_group_count": 1,
        "lhs_dilation": (1, 1),
        "rhs_dilation": (1, 1),
        "precision": None,
    }
    with pytest.raises(ValueError, match="only dot sites keep outlier features"):
        conv(jnp.ones((2, 6, 6, 3)), kernel, to_kernel, params)


def to_kernel(matrix):
    return matrix.reshape(3, 3, 3, -1)


def test_a_site_keeps_its_outliers_through_apply_and_files(tmp_path):
    params, x = {"w": quantized()}, spiky(3)

    def f(params, x):
        return x @ params["w"]

    y = apply(f)(params, x)
    np.testing.assert_array_equal(y, matmul(x, params["w"]))
    save(tmp_path / "model", params)
    back = restore(tmp_path / "model")
    assert back["w"].acts[0].activation == KEEPS
    np.testing.assert_array_equal(apply(f)(back, x), y)


def test_a_static_global_scale_survives_files(tmp_path):
    static = Activation(NVFP4(), dynamic=False)
    acts = SiteActs(activation=static, global_scale=jnp.full((1, 1), 3.0))
    q = QTensor.of(encode(W, Int(8)), Layout("kn", (K, N)), W.dtype, (acts,))
    save(tmp_path / "model", {"w": q})
    back = restore(tmp_path / "model")["w"].acts[0]
    assert back.activation == static
    np.testing.assert_array_equal(back.global_scale, [[3.0]])


def test_files_older_than_a_field_take_its_default():
    node, arrays = treespec.encode(SiteActs(jnp.ones((1, 1)), activation=KEEPS))
    del node["fields"]["global_scale"]
    del node["fields"]["activation"]["fields"]["outliers"]
    back = treespec.decode(node, arrays.__getitem__)
    assert back.activation == Activation(INT8) and back.global_scale is None
    node["fields"]["activation"]["fields"]["unheard_of"] = 1
    with pytest.raises(ValueError, match="Activation is stored with fields"):
        treespec.decode(node, arrays.__getitem__)
    del node["fields"]["activation"]["fields"]["unheard_of"]
    del node["fields"]["activation"]["fields"]["format"]
    with pytest.raises(ValueError, match="Activation is stored with fields"):
        treespec.decode(node, arrays.__getitem__)


def test_inputs_have_no_learned_vectors():
    with pytest.raises(ValueError, match="format is vectors 8 bits x8, whose vectors"):
        Activation(Additive())


BAD = [
    ({"outliers": 0}, "Activation.outliers must be a threshold above 0, .* got 0"),
    ({"outliers": True}, "Activation.outliers must be"),
    ({"outliers": 6.0, "dynamic": False}, "outlier features are found in the batch"),
]


@pytest.mark.parametrize(("fields", "message"), BAD)
def test_bad_thresholds_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        Activation(INT8, **fields)
