"""Coded activations: the arithmetic is in integers, and equals the simulation."""

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from qjax.core.coded import encode, pack_codes
from qjax.core.formats import (
    NVFP4,
    Additive,
    Float,
    Int,
    block,
    channel,
    group,
    tensor,
    token,
)
from qjax.core.layout import Layout
from qjax.core.qtensor import Activation, QTensor, SiteActs
from qjax.core.scales import Grid
from qjax.ops import Target, conv, matmul
from qjax.ops.activations import code_input
from qjax.ops.kernels import choices

K, N, M = 100, 24, 6


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def simulated(x, q):
    """The same contraction on the values that the codes stand for, in float64."""
    values = code_input(x, q.site(0)).decode(jnp.float32)
    return jnp.matmul(values, q.matrix(jnp.float32), precision="highest")


def dots(closed):
    """Operand and result dtypes of every contraction."""
    found = []

    def walk(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
                kinds = [v.aval.dtype.name for v in (*eqn.invars, *eqn.outvars)]
                found.append(tuple(kinds))
            for value in eqn.params.values():
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    walk(inner)

    walk(closed.jaxpr)
    return set(found)


WEIGHTS = {
    "int8": Int(8),
    "int8_tensor": Int(8, tensor()),
    "int8_asym": Int(8, symmetric=False),
    "int4_group": Int(4, group(32)),
    "int4_group_asym": Int(4, group(32), symmetric=False),
    "int3_float_zero": Int(3, group(32), zero="float"),
    "int4_block": Int(4, block(32, 16)),
}
ACTIVATIONS = {
    "token": Int(8, token()),
    "tensor": Int(8, tensor()),
    "token_asym": Int(8, token(), symmetric=False),
    "group": Int(8, group(32)),
    "int4": Int(4, token()),
}


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_integers_meet_integers(weight, activation):
    acts = (SiteActs(activation=Activation(ACTIVATIONS[activation])),)
    coded = encode(normal(0, K, N), WEIGHTS[weight])
    q = QTensor.of(coded, Layout("kn", (K, N)), jnp.float32, acts)
    x = normal(1, M, K) + 0.5
    assert dots(jax.make_jaxpr(matmul)(x, q)) == {("int8", "int8", "int32")}
    want = simulated(x, q)
    chex.assert_trees_all_close(matmul(x, q), want, rtol=1e-4, atol=1e-4)
    error = jnp.linalg.norm(want - x @ normal(0, K, N)) / jnp.linalg.norm(want)
    assert error < 0.5


@pytest.mark.parametrize("granularity", [channel(), tensor(), block(32, 8)])
def test_float8_meets_float8(granularity):
    own = token() if granularity != block(32, 8) else group(32)
    acts = (SiteActs(activation=Activation(Float("e4m3", own))),)
    coded = encode(normal(0, K, N), Float("e4m3", granularity))
    q = QTensor.of(coded, Layout("kn", (K, N)), jnp.float32, acts)
    x = normal(1, M, K)
    kinds = dots(jax.make_jaxpr(matmul)(x, q))
    assert kinds == {("float8_e4m3fn", "float8_e4m3fn", "float32")}
    chex.assert_trees_all_close(matmul(x, q), simulated(x, q), rtol=1e-4, atol=1e-4)


REGIONS = {"tensor": tensor(), "feature": block(1, None), "token": token()} | {
    "group": group(32)
}


@pytest.mark.parametrize("region", REGIONS)
@pytest.mark.parametrize("dtype", ["int8", "int4", "e4m3"])
def test_a_dynamic_range_of_every_kind(region, dtype):
    """The largest magnitude of each region sets its scale, batch by batch."""
    own = REGIONS[region]
    format = Float(dtype, own) if dtype == "e4m3" else Int(int(dtype[3:]), own)
    acts = (SiteActs(activation=Activation(format)),)
    coded = encode(normal(0, K, N), Float("e4m3") if dtype == "e4m3" else Int(8))
    q = QTensor.of(coded, Layout("kn", (K, N)), jnp.float32, acts)
    x = np.asarray(normal(1, M, K))
    if region == "group":  # the last one is smaller
        tops = np.maximum.reduceat(np.abs(x), np.arange(0, K, 32), axis=1)
        tops = np.repeat(tops, 32, axis=1)[:, :K]
    else:
        axis = {"tensor": (0, 1), "feature": 0, "token": 1}[region]
        tops = np.abs(x).max(axis, keepdims=True)
    scale = tops / np.float32(448 if dtype == "e4m3" else (2**format.bits - 1) / 2)
    if dtype == "e4m3":
        codes = np.clip(x / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    else:
        codes = np.clip(np.round(x / scale), -format.half, format.half - 1)
    want = (
        codes.astype(np.float64)
        * scale
        @ np.asarray(coded.decode(jnp.float32), np.float64)
    )
    np.testing.assert_allclose(matmul(jnp.asarray(x), q), want, rtol=1e-4, atol=1e-4)


def test_experts_have_their_own_scales():
    acts = (SiteActs(activation=Activation(Int(8, token()))),)
    coded = encode(normal(0, 3, K, N), Int(8, group(32)))
    q = QTensor.of(coded, Layout("bkn", (0, K, N)), jnp.float32, acts)
    x = normal(1, 3, M, K)
    chex.assert_trees_all_close(matmul(x, q), simulated(x, q), rtol=1e-4, atol=1e-4)


def test_static_scale_is_used():
    scale = jnp.full((1, 1), 0.05)
    activation = Activation(Int(8, tensor()), dynamic=False)
    coded = encode(normal(0, K, N), Int(8))
    layout = Layout("kn", (K, N))
    acts = (SiteActs(scale=scale, activation=activation),)
    q = QTensor.of(coded, layout, jnp.float32, acts)
    x = normal(1, M, K)
    want = jnp.clip(jnp.round(x / 0.05), -128, 127) * 0.05 @ coded.decode(jnp.float32)
    chex.assert_trees_all_close(matmul(x, q), want, rtol=1e-4, atol=1e-4)
    missing = QTensor.of(coded, layout, jnp.float32, (SiteActs(activation=activation),))
    with pytest.raises(ValueError, match="static but has no scale"):
        matmul(x, missing)


def test_formats_without_common_arithmetic_contract_values():
    acts = (SiteActs(activation=Activation(Int(8, token()))),)
    coded = encode(normal(0, 64, N), NVFP4())
    q = QTensor.of(coded, Layout("kn", (64, N)), jnp.float32, acts)
    x = normal(1, M, 64)
    chex.assert_trees_all_close(matmul(x, q), simulated(x, q), rtol=1e-4, atol=1e-4)


def test_unknown_implementation_is_refused():
    q = QTensor.of(encode(normal(0, K, N), Int(8)), Layout("kn", (K, N)), jnp.float32)
    with pytest.raises(ValueError, match="'fast'"):
        matmul(normal(1, M, K), q, implementation="fast")


def test_convolution_in_integers():
    w, x = normal(0, 3, 3, 8, 16), normal(1, 2, 8, 8, 8)
    layout = Layout("kkkn", w.shape)
    spec = jax.lax.conv_dimension_numbers(x.shape, w.shape, ("NHWC", "HWIO", "NHWC"))
    params = {
        "window_strides": (1, 1),
        "padding": ((1, 1), (1, 1)),
        "dimension_numbers": spec,
    }
    acts = (SiteActs(activation=Activation(Int(8, token()))),)
    q = QTensor.of(encode(layout.to_matrix(w), Int(8)), layout, w.dtype, acts)

    def run(x, q):
        return conv(x, q, layout.from_matrix, params)

    assert dots(jax.make_jaxpr(run)(x, q)) == {("int8", "int8", "int32")}
    steps = jnp.abs(x).max((1, 2, 3), keepdims=True) / 127.5
    coded = jnp.clip(jnp.round(x / steps), -128, 127) * steps
    want = jax.lax.conv_general_dilated(coded, q.dequantize(), **params)
    chex.assert_trees_all_close(run(x, q), want, rtol=1e-4, atol=1e-4)


def test_result_dtype_follows_the_contraction():
    q = QTensor.of(encode(normal(0, K, N), Int(8)), Layout("kn", (K, N)), jnp.bfloat16)
    x = normal(1, M, K).astype(jnp.bfloat16)
    assert matmul(x, q).dtype == jnp.bfloat16
    assert matmul(x, q, dtype=jnp.float32).dtype == jnp.float32


def additive(books, bits, K=64, N=40):
    """AQLM's layouts with random codes: a leaf, and its weight in float64."""
    draw, format = np.random.default_rng(0), Additive(bits)
    scale = draw.uniform(0.5, 2, (1, N)).astype(np.float32)
    parts, w = [], np.zeros((K, N))
    for _ in range(books):
        book = draw.normal(0, 1, (2**bits, 8)).astype(np.float32)
        codes = draw.integers(0, 2**bits, (K // 8, N))
        for j in range(K // 8):
            w[8 * j : 8 * j + 8] += book[codes[j]].T.astype(np.float64)
        grid = Grid(jnp.asarray(scale), codebook=jnp.asarray(book))
        codes = jnp.asarray(codes.astype(np.uint8 if bits == 8 else np.uint16))
        parts.append(pack_codes(codes, grid, format, (K, N)))
    return QTensor.of(parts, Layout("kn", (K, N)), jnp.float32), w * scale


@pytest.mark.parametrize(("books", "bits"), [(2, 8), (1, 16)], ids=["2x8", "1x16"])
@pytest.mark.parametrize("M", [3, 20])
def test_sums_of_code_vectors(books, bits, M):
    q, w = additive(books, bits)
    x = normal(1, M, 64)
    (choice, *_) = choices(q, 0, x, "auto", Target("cpu"))
    assert ("code vectors first" in choice.name) == (bits == 8 and M == 3)
    assert q.parts[0].codes.nbytes == 64 * 40 // 8 * bits // 8
    exact = np.asarray(x, np.float64) @ w
    y, pull = jax.vjp(lambda x: matmul(x, q), x)
    np.testing.assert_allclose(y, exact, rtol=1e-4, atol=1e-4)
    expected = np.ones((M, 40)) @ w.T
    np.testing.assert_allclose(
        pull(jnp.ones_like(y))[0], expected, rtol=1e-4, atol=1e-4
    )


def test_a_second_codebook_codes_what_the_first_left():
    w = normal(0, 2, 64, 48)
    format = Additive(8, 4)
    first = encode(w, format)
    second = encode(w - first.decode(), format)
    errors = [
        jnp.linalg.norm(w - d)
        for d in (0, first.decode(), first.decode() + second.decode())
    ]
    assert errors[2] < 0.75 * errors[1] < 0.75 * 0.75 * errors[0]
    with pytest.raises(ValueError, match=r"length 5 must divide them"):
        encode(w, Additive(8, 5))
    with pytest.raises(ValueError, match=r"Additive\.bits is 4"):
        Additive(4)
