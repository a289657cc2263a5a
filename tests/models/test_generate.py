"""Decoding: the cache changes nothing, and arguments are checked."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qjax.models import Function, functional, generate, llama, rope

CONFIG = llama.Config(
    vocabulary=50,
    features=32,
    mlp_features=48,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=8,
    context=64,
    epsilon=1e-5,
    rope=rope.plain(8, 10_000.0),
    tied=True,
    windows=(None, 4),
)
TOKENS = jax.random.randint(jax.random.key(1), (2, 10), 0, 50)


@functools.cache
def model(scan_layers: bool):
    f, params = functional(
        llama.Llama(CONFIG, rngs=nnx.Rngs(0), scan_layers=scan_layers)
    )

    def wide(leaf):
        return leaf + 0.3 * jax.random.normal(jax.random.key(leaf.size), leaf.shape)

    return f, jax.tree.map(wide, params)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_any_split_of_the_prompt_gives_the_same_logits(scan_layers: bool):
    f, params = model(scan_layers)
    call = jax.jit(f)
    whole = call(params, TOKENS)
    cache, parts = f.init_cache(2, 16, jnp.float32), []
    for part in jnp.split(TOKENS, [8, 9], axis=1):
        logits, cache = call(params, part, cache)
        parts.append(logits)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, atol=2e-5)
    assert int(cache.length) == 10


@pytest.mark.parametrize("scan_layers", [False, True])
def test_greedy_equals_the_whole_forward_pass(scan_layers: bool):
    f, params = model(scan_layers)
    out = generate(f, params, TOKENS, 5)
    np.testing.assert_array_equal(out[:, :10], TOKENS)
    best = jnp.argmax(jax.jit(f)(params, out), axis=-1)
    np.testing.assert_array_equal(out[:, 10:], best[:, 9:-1])


def test_sampling_is_of_the_key_and_cold_sampling_is_greedy():
    f, params = model(True)

    def sample(seed, heat):
        return np.asarray(
            generate(f, params, TOKENS, 5, temperature=heat, key=jax.random.key(seed))
        )

    np.testing.assert_array_equal(sample(0, 1.0), sample(0, 1.0))
    assert (sample(0, 1.0) != sample(1, 1.0)).any()
    np.testing.assert_array_equal(sample(0, 1e-4), generate(f, params, TOKENS, 5))


def test_remat_changes_no_gradient():
    gradients = []
    for remat in (False, True):
        net = llama.Llama(CONFIG, rngs=nnx.Rngs(0), scan_layers=True, remat=remat)
        f, params = functional(net)

        def loss(p, f=f):
            return jnp.mean(f(p, TOKENS) ** 2)

        gradients.append(jax.jit(jax.grad(loss))(params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), *gradients)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens is 0, expected at least 1"),
        ({"temperature": -1.0}, ValueError, "temperature is -1.0, expected 0 or more"),
        ({"temperature": 1.0}, ValueError, "key is None"),
        ({"f": Function(lambda p, t: t)}, TypeError, "generate needs f.init_cache"),
    ],
)
def test_bad_arguments(options, error, message):
    f, params = model(True)
    arguments = {"f": f, "params": params, "tokens": TOKENS, "max_new_tokens": 1}
    with pytest.raises(error, match=message):
        generate(**(arguments | options))
