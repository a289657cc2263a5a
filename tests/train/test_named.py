"""Keys, values and other named activations are rounded wherever they are made."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

import qjax
from qjax.models import functional, generate, llama, rope
from qjax.models.coded_cache import quantize_cache
from qjax.ops.kv_cache import encode
from qjax.train import quantize_named

INT4 = qjax.Int(4, qjax.token(), scale_rule="narrow")
FORMATS = {"keys": INT4, "values": INT4}
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(2, 5, 8)), jnp.float32)
PARAMS = {
    name: jnp.asarray(RNG.normal(size=(3, 8, 8)) / 3, jnp.float32) for name in "qkvo"
}


def rounded(x):
    """Symmetric, one scale for each vector, with the gradient of the identity."""
    scale = jnp.max(jnp.abs(x), axis=-1, keepdims=True) / 7
    value = jnp.round(x / scale) * scale
    return x + jax.lax.stop_gradient(value - x)


def attend(keep):
    """Three layers of attention in a scan, one of whose jits names two values."""

    @jax.jit
    def products(w, x):
        k, v = keep(x @ w["k"], "keys"), keep(x @ w["v"], "values")
        return x @ w["q"], k, v

    @jax.checkpoint
    def layer(x, w):
        q, k, v = products(w, x)
        weights = jax.nn.softmax(jnp.einsum("btd,bsd->bts", q, k), axis=-1)
        return x + jnp.einsum("bts,bsd->btd", weights, v) @ w["o"]

    return lambda p, x: jax.lax.scan(lambda x, w: (layer(x, w), None), x, p)[0]


named = attend(checkpoint_name)
by_hand = attend(lambda x, name: rounded(x))


def test_values_and_gradients_are_those_of_rounding_by_hand():
    f = quantize_named(named, FORMATS)
    loss = lambda f: jax.jit(jax.value_and_grad(lambda p: jnp.sum(f(p, X) ** 2)))
    value, grads = loss(f)(PARAMS)
    wanted, wanted_grads = loss(by_hand)(PARAMS)
    plain, _ = loss(named)(PARAMS)
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    assert abs(plain - wanted) > 1e-2
    for name in PARAMS:
        largest = np.abs(wanted_grads[name]).max()
        atol = 1e-6 * largest  # of sums of such terms
        np.testing.assert_allclose(grads[name], wanted_grads[name], atol=atol)


def test_what_is_trained_is_served():
    f = quantize_named(named, FORMATS)
    weights = qjax.StraightThrough(qjax.Int(4, scale_rule="narrow"))
    f_qat, qstate = qjax.fake_quantize(f, PARAMS, qjax.QAT(weights), example=(X,))
    trained = jax.jit(f_qat)(PARAMS, qstate, X)[0]
    q = qjax.finalize(PARAMS, qstate)
    assert qjax.is_quantized(q["k"])
    for served in (qjax.apply(f), f):
        np.testing.assert_allclose(jax.jit(served)(q, X), trained, atol=1e-5)


def decoder():
    """A Llama of two layers, its parameters far from their initialisation."""
    config = llama.Config(
        vocabulary=50, features=32, mlp_features=48, layers=2, heads=4, kv_heads=2,
        head_dim=8, context=64, epsilon=1e-5, rope=rope.plain(8, 1e4), tied=True,
        windows=(None, None),
    )  # fmt: skip
    plain, params = functional(llama.Llama(config, rngs=nnx.Rngs(0), scan_layers=True))
    params = jax.tree.map(
        lambda w: w + 0.3 * jax.random.normal(jax.random.key(w.size), w.shape), params
    )
    return plain, params


def test_a_cache_holds_the_rounded_values():
    plain, params = decoder()
    f = quantize_named(plain, FORMATS)
    tokens = jax.random.randint(jax.random.key(1), (2, 6), 0, 50)
    out = generate(f, params, tokens, 4)
    logits = jax.jit(f)(params, out)
    np.testing.assert_array_equal(out[:, 6:], jnp.argmax(logits, -1)[:, 5:-1])
    cache = jax.jit(f)(params, tokens, f.init_cache(2, 6, jnp.float32))[1]
    for kept in (cache.k, cache.v):
        steps = kept / (jnp.max(jnp.abs(kept), axis=-1, keepdims=True) / 7)
        np.testing.assert_allclose(steps, jnp.round(steps), atol=1e-4)
    assert not np.allclose(logits, jax.jit(plain)(params, out), atol=1e-2)
    everything = FORMATS | {"queries": INT4, "attention": qjax.Int(8, qjax.token())}
    jax.eval_shape(quantize_named(plain, everything), params, tokens)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_coded_cache_stores_them_as_they_were_trained(bits):
    """Its codes and scales give back every bit, so that nothing is rounded twice."""

    def f(p, x):
        return checkpoint_name(x, "keys") + checkpoint_name(x, "values")

    x = jnp.asarray(RNG.normal(size=(2, 3, 4, 8)), jnp.float32)
    values = qjax.quantize_kv(f, bits)((), x) / 2
    codes, scale = encode(values, f"int{bits}")
    decoded = codes.astype(jnp.float32) * scale[..., None]
    np.testing.assert_allclose(decoded, values, rtol=2e-7)
    assert np.abs(values - x).max() > 1e-3
    with pytest.raises(ValueError, match=r"quantize_kv\.bits must be a whole number"):
        qjax.quantize_kv(f, 9)


def test_a_step_of_decoding_codes_them_after_rounding():
    """Two bits are codes -7, 0 and 7 of the four that the cache has."""
    plain, params = decoder()
    queries = quantize_named(plain, {"queries": INT4})
    f = qjax.quantize_kv(queries, 2)
    tokens = jax.random.randint(jax.random.key(1), (2, 6), 0, 50)
    call, logits = jax.jit(f), {}
    for dtype in (jnp.int4, jnp.float32):
        _, cache = call(params, tokens[:, :5], plain.init_cache(2, 6, dtype))
        logits[dtype], cache = call(params, tokens[:, 5:], cache)
        if dtype == jnp.int4:
            assert set(np.unique(cache.k.codes.astype(jnp.int8))) == {-7, 0, 7}
    np.testing.assert_allclose(logits[jnp.int4], logits[jnp.float32], atol=2e-5)


def test_a_coded_cache_is_not_made_without_the_rounding():
    plain, params = decoder()
    f = dataclasses.replace(plain, with_coded_cache=lambda: plain)
    with pytest.raises(TypeError, match="before quantize_kv or quantize_named"):
        quantize_cache(qjax.quantize_kv(f, 4), params, [(jnp.ones((1, 2), int),)])


def test_bad_arguments():
    with pytest.raises(ValueError, match="no value 'cache'; its names are keys, val"):
        quantize_named(named, {"cache": INT4})(PARAMS, X)
    with pytest.raises(TypeError, match="'keys' must be given a format"):
        quantize_named(named, {"keys": 4})
    with pytest.raises(TypeError, match="'keys' must be given dynamic ranges"):
        quantize_named(named, {"keys": qjax.LSQ(4)})
