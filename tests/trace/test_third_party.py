"""Models made of other libraries' own layers, without a change to them."""

import warnings

import chex
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import qjax

RECIPE = qjax.RTN(weights=qjax.Int(8, qjax.channel()))
KEY = jax.random.key(0)
x = jax.random.normal(KEY, (2, 7, 32))
image = jax.random.normal(KEY, (2, 8, 8, 4))
ids = jnp.array([[1, 5, 3], [0, 7, 2]])


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, h):
        attended = nn.MultiHeadDotProductAttention(num_heads=4)(nn.LayerNorm()(h))
        h = h + attended
        h = h + nn.Dense(32)(nn.gelu(nn.Dense(64)(nn.RMSNorm()(h))))
        return nn.DenseGeneral((4, 8))(h).reshape(h.shape)


class LinenScanned(nn.Module):
    @nn.compact
    def __call__(self, h):
        layer = nn.remat(nn.Dense)
        body = nn.scan(
            lambda module, h, _: (jnp.tanh(module(h)), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
        )
        return body(layer(32), h, None)[0]


class LinenConv(nn.Module):
    @nn.compact
    def __call__(self, h):
        h = nn.relu(nn.Conv(8, (3, 3))(h))
        h = nn.Conv(8, (3, 3), feature_group_count=8)(h)
        return nn.Dense(5)(h.mean((1, 2)))


class LinenOwnParam(nn.Module):
    """The receiver is not called self, and the parameter is used by hand."""

    @nn.compact
    def __call__(this, h):
        w = this.param("w", nn.initializers.lecun_normal(), (32, 16))
        return h @ w


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(4, 32, decode=False, rngs=rngs)
        self.up = nnx.Linear(32, 64, rngs=rngs)
        self.down = nnx.LinearGeneral(64, (4, 8), rngs=rngs)
        self.norm = nnx.LayerNorm(32, rngs=rngs)
        self.own = nnx.Param(jax.random.normal(rngs.params(), (32, 32)) / 6)

    def __call__(self, h):
        h = h + self.attention(self.norm(h))
        h = h + self.down(jax.nn.silu(self.up(h))).reshape(h.shape)
        return h @ self.own[...]


class NnxConv(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Conv(4, 8, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(8, use_running_average=True, rngs=rngs)
        self.head = nnx.Linear(8, 5, rngs=rngs)

    def __call__(self, h):
        h = jax.nn.relu(self.norm(self.first(h)))
        return self.head(h.mean((1, 2)))


class NnxScanned(nnx.Module):
    def __init__(self, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=0, out_axes=0)
        def make(rngs):
            return nnx.Linear(32, 32, rngs=rngs)

        self.layers = make(rngs)

    def __call__(self, h):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def run(h, layer):
            return jnp.tanh(layer(h))

        return run(h, self.layers)


class NnxLanguage(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(16, 32, rngs=rngs)
        self.mlp = nnx.Linear(32, 32, rngs=rngs)

    def __call__(self, tokens):
        return self.embed.attend(jnp.tanh(self.mlp(self.embed(tokens))))


class EqxMlp(eqx.Module):
    mlp: eqx.nn.MLP
    norm: eqx.nn.LayerNorm

    def __init__(self, key):
        self.mlp = eqx.nn.MLP(32, 16, 64, 2, key=key)
        self.norm = eqx.nn.LayerNorm(32)

    def __call__(self, h):
        return jax.vmap(jax.vmap(lambda row: self.mlp(self.norm(row))))(h)


def linen(module, *inputs):
    return qjax.functional(module, module.init(KEY, *inputs))


MODELS = {
    "linen_block": (lambda: linen(LinenBlock(), x), (x,), 7),
    "linen_scan_of_remat": (lambda: linen(LinenScanned(), x), (x,), 1),
    "linen_conv": (lambda: linen(LinenConv(), image), (image,), 3),
    "linen_own_param": (lambda: linen(LinenOwnParam(), x), (x,), 1),
    "nnx_block": (lambda: qjax.functional(NnxBlock(nnx.Rngs(0))), (x,), 7),
    "nnx_conv": (lambda: qjax.functional(NnxConv(nnx.Rngs(0))), (image,), 2),
    "nnx_scan": (lambda: qjax.functional(NnxScanned(nnx.Rngs(0))), (x,), 1),
    "nnx_tied": (lambda: qjax.functional(NnxLanguage(nnx.Rngs(0))), (ids,), 1),
    "equinox_mlp": (lambda: qjax.functional(EqxMlp(KEY)), (x,), 3),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_matrix_runs_in_low_bits(name):
    """Nothing stays in float silently, even after the float model has been jitted."""
    build, inputs, count = MODELS[name]
    f, params = build()
    want = jax.jit(f)(params, *inputs)
    qparams = qjax.quantize(f, params, RECIPE, [inputs], progress=False)
    leaves = jax.tree.leaves(qparams, is_leaf=qjax.is_quantized)
    assert sum(map(qjax.is_quantized, leaves)) == count
    paths = [jax.tree_util.keystr(k) for k, _ in jax.tree_util.tree_leaves_with_path(
        qparams, is_leaf=qjax.is_quantized
    )]  # fmt: skip
    assert paths == [
        jax.tree_util.keystr(k) for k, _ in jax.tree_util.tree_leaves_with_path(params)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error", qjax.QuantizationWarning)
        got = jax.jit(qjax.apply(f))(qparams, *inputs)
    chex.assert_trees_all_close(
        got, f(qjax.dequantize(qparams), *inputs), rtol=1e-4, atol=1e-4
    )
    assert jnp.linalg.norm(got - want) < 0.05 * jnp.linalg.norm(want)
    found = qjax.sites(f, qparams, *inputs)
    ran = {s.path: s.runs for s in found.weights if s.runs != "float"}
    assert len(ran) == count
    assert all(way.startswith("low-bit") for way in ran.values())


def calibrated_error(f, params, batches, recipe):
    q = qjax.quantize(f, params, recipe, batches, progress=False)
    run = jax.jit(f)
    pairs = [(run(qjax.dequantize(q), *b), run(params, *b)) for b in batches]
    return sum(float(jnp.square(a - b).sum()) for a, b in pairs)


@pytest.mark.parametrize("name", ["linen_block", "nnx_block", "equinox_mlp"])
def test_gptq_loses_less_than_rounding(name):
    f, params = MODELS[name][0]()
    batches = [(jax.random.normal(KEY, (8, 16, 32)),)]
    int3 = qjax.Int(3, qjax.channel())
    recipes = qjax.GPTQ(weights=int3), qjax.RTN(weights=int3)
    gptq, rtn = (calibrated_error(f, params, batches, recipe) for recipe in recipes)
    assert gptq < 0.8 * rtn


def test_every_use_of_every_leaf_is_accounted_for():
    f, params = MODELS["linen_block"][0]()
    found = qjax.sites(f, params, x)
    named = {s.path for s in found.weights} | {u.path for u in found.other_uses}
    assert named == set(found.shapes)
    assert found.unused == ()


def test_embedding_and_head_share_one_leaf():
    f, params = MODELS["nnx_tied"][0]()
    found = qjax.sites(f, params, ids)
    kinds = [s.kind for s in found.of("embed/embedding")]
    assert kinds == ["embedding", "dot"]
    recipe = qjax.RTN(weights=qjax.Int(8), targets=("embed/*", "Linear"))
    qparams = qjax.quantize(f, params, recipe, [(ids,)], progress=False)
    got = qjax.apply(f)(qparams, ids)
    chex.assert_trees_all_close(got, f(qjax.dequantize(qparams), ids), rtol=1e-4)
