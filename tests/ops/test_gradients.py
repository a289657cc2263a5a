"""Coded activations differentiate as the values they stand for, straight through."""

import chex
import jax
import jax.numpy as jnp
import pytest

from qjax.core.coded import encode
from qjax.core.formats import Float, Granularity, Int, channel, group, tensor, token
from qjax.core.layout import Layout
from qjax.core.qtensor import Activation, QTensor, SiteActs
from qjax.ops import conv, matmul, ragged_matmul
from qjax.ops.activations import code_input
from qjax.trace import apply, sites

K, N, M, E = 32, 16, 6, 3
SPEC = ("NHWC", "HWIO", "NHWC")


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def quantized(w, roles, weights, activations):
    sizes = tuple(0 if r == "b" else s for r, s in zip(roles, w.shape))
    layout = Layout(roles, sizes)
    acts = (SiteActs(activation=Activation(activations)),) if activations else ()
    return QTensor.of(encode(layout.to_matrix(w), weights), layout, w.dtype, acts)


FORMATS = {
    "int8": (Int(8), Int(8, token())),
    "int4_group": (Int(4, group(16), symmetric=False), Int(8, token())),
    "float8": (Float(), Float("e4m3", token())),
    "values": (Int(4, group(16)), Float("e4m3", token())),
}


@pytest.mark.parametrize("name", FORMATS)
def test_matmul(name):
    q, x = quantized(normal(0, K, N), "kn", *FORMATS[name]), normal(1, M, K)
    cotangent = normal(2, M, N)
    got = jax.vjp(lambda x: matmul(x, q), x)[1](cotangent)[0]
    chex.assert_trees_all_close(got, cotangent @ q.dequantize().T, rtol=1e-4, atol=1e-4)
    forward = jax.jvp(lambda x: matmul(x, q), (x,), (x,))[1]
    chex.assert_trees_all_close(forward, x @ q.dequantize(), rtol=1e-4, atol=1e-4)


def test_through_apply_under_jit():
    q, x = quantized(normal(0, K, N), "kn", *FORMATS["int8"]), normal(1, M, K)

    def loss(gain):
        return apply(lambda p, x: (x * p["g"]) @ p["w"])({"w": q, "g": gain}, x).sum()

    want = (x * q.dequantize().sum(1)).sum(0)
    got = jax.jit(jax.grad(loss))(jnp.ones(K))
    chex.assert_trees_all_close(got, want, rtol=1e-4, atol=1e-4)


def test_ragged():
    w, x = normal(0, E, K, N), normal(1, M, K)
    q = quantized(w, "bkn", Int(8), Int(8, token()))
    sizes = jnp.array([2, 0, 3], jnp.int32)
    text = str(jax.make_jaxpr(lambda x: ragged_matmul(x, q, sizes))(x))
    assert f":i32[{M},{N}] = ragged_dot_general" in text
    values = code_input(x, q.site(0)).decode(x.dtype)
    want = jax.lax.ragged_dot(values, q.dequantize(), sizes)
    chex.assert_trees_all_close(ragged_matmul(x, q, sizes), want, rtol=1e-4, atol=1e-4)
    got, exact = (
        jax.grad(lambda x, f=f: (f(x) * normal(3, M, N)).sum())(x)
        for f in (
            lambda x: ragged_matmul(x, q, sizes),
            lambda x: jax.lax.ragged_dot(x, q.dequantize(), sizes),
        )
    )
    chex.assert_trees_all_close(got, exact, rtol=1e-4, atol=1e-4)


def test_ragged_says_when_it_contracts_values():
    w = normal(0, E, K, N)
    q = quantized(w, "bkn", Int(4, group(16)), Int(8, token()))
    f = lambda p, x: jax.lax.ragged_dot(x, p, jnp.array([2, 1, 3]))
    (site,) = sites(f, q, normal(1, M, K)).weights
    assert site.runs.endswith("coded, as floats")


def params(x, w):
    spec = jax.lax.conv_dimension_numbers(x.shape, w.shape, SPEC)
    return {
        "window_strides": (1, 1),
        "padding": ((1, 1), (1, 1)),
        "dimension_numbers": spec,
    }


@pytest.mark.parametrize("activations", [None, Int(8, token()), Int(8, tensor())])
@pytest.mark.parametrize("granularity", [channel(), tensor(), Granularity(None, 4)])
def test_conv(activations, granularity):
    """Also where columns share scales and the last block is partial."""
    w, x = normal(0, 3, 3, 4, 9), normal(1, 2, 6, 6, 4)
    q = quantized(w, "kkkn", Int(8, granularity), activations)
    options = params(x, w)
    run = lambda x: conv(x, q, q.layout.from_matrix, options)
    exact = lambda x: jax.lax.conv_general_dilated(x, q.dequantize(), **options)
    error = jnp.linalg.norm(run(x) - exact(x)) / jnp.linalg.norm(exact(x))
    assert error < (1e-5 if activations is None else 0.02)
    got, want = (jax.grad(lambda x, f=f: (f(x) ** 2).sum())(x) for f in (run, exact))
    assert jnp.linalg.norm(got - want) < 0.03 * jnp.linalg.norm(want)


def test_conv_takes_a_static_range_and_a_bias():
    w, x = normal(0, 3, 3, 4, 8), normal(1, 2, 6, 6, 4)
    layout = Layout("kkkn", w.shape)
    static = Activation(Int(8, tensor()), dynamic=False)
    acts = (SiteActs(scale=jnp.full((1, 1), 100.0), activation=static),)
    coded = encode(layout.to_matrix(w), Int(8))
    q = QTensor.of(coded, layout, w.dtype, acts, bias=jnp.arange(8.0))
    y = conv(x, q, layout.from_matrix, params(x, w))
    chex.assert_trees_all_close(y, jnp.broadcast_to(jnp.arange(8.0), y.shape))


def test_conv_is_compiled_once():
    from qjax.ops.conv import _qconv

    w, x = normal(0, 3, 3, 4, 8), normal(1, 2, 6, 6, 4)
    q = quantized(w, "kkkn", Int(8), None)

    def f(p, x):
        return jax.lax.conv_general_dilated(
            x, p, (1, 1), "SAME", dimension_numbers=SPEC
        )

    apply(f)(q, x)
    before = _qconv._cache_size()
    for _ in range(3):
        apply(f)(q, x)
    assert _qconv._cache_size() == before
