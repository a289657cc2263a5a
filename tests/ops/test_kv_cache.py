"""Caches of few bits: what is read is what was written, to half a step of the codes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qjax.core.formats import Float, Int
from qjax.models import functional, generate, llama, rope
from qjax.ops import kv_cache

E4M3 = Float("e4m3")
SHAPE = (2, 3, 8, 4, 16)  # L B S G d


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 3, shape).astype(np.float32)


def test_int8_is_read_to_half_a_step(strict):
    new = random(3, 5, 4, 16)
    new[0, 1, 2] = 0
    cache = kv_cache.write(
        kv_cache.empty(SHAPE, jnp.int8), jnp.int32(1), jnp.int32(2), jnp.asarray(new)
    )
    found = np.asarray(kv_cache.read(cache, jnp.int32(1), jnp.float32))
    step = np.abs(new).astype(np.float64).max(-1, keepdims=True) / 127
    assert (np.abs(found[:, 2:7] - new) <= step / 2 * (1 + 1e-5)).all()
    assert (found[:, :2] == 0).all() and (found[:, 7:] == 0).all()
    assert (np.asarray(kv_cache.read(cache, jnp.int32(0), jnp.float32)) == 0).all()


def test_a_new_token_changes_no_old_code():
    first = kv_cache.write(
        kv_cache.empty(SHAPE, jnp.int8), 0, 0, jnp.asarray(random(3, 4, 4, 16))
    )
    then = kv_cache.write(first, 0, 4, jnp.asarray(100 * random(3, 1, 4, 16, seed=1)))
    np.testing.assert_array_equal(then.codes[0, :, :4], first.codes[0, :, :4])
    np.testing.assert_array_equal(then.scale[0, ..., :4], first.scale[0, ..., :4])


def test_float8_is_clipped_and_not_nan():
    new = jnp.full((3, 1, 4, 16), 1e6)
    cache = kv_cache.write(kv_cache.empty(SHAPE, jnp.float8_e4m3fn), 0, 0, new)
    assert (np.asarray(kv_cache.read(cache, 0, jnp.float32))[:, 0] == 448).all()


@pytest.mark.parametrize(
    ("dtype", "step"), [(jnp.int4, 1 / 7 / 2), (Int(4), 1 / 7 / 2), (E4M3, 2**-4)]
)
def test_fewer_bits_are_read_to_their_step(dtype, step, strict):
    """Half a step of int4; e4m3 is off by half a unit in the last of 4 digits."""
    new = random(3, 5, 4, 16) * 1e-3
    new[0, 1, 2] = 0
    cache = kv_cache.write(
        kv_cache.empty(SHAPE, dtype), jnp.int32(1), jnp.int32(2), jnp.asarray(new)
    )
    found = np.asarray(kv_cache.read(cache, jnp.int32(1), jnp.float32))[:, 2:7]
    largest = np.abs(new).max(-1, keepdims=True)
    near = np.abs(new) if dtype is E4M3 else largest
    smallest = largest / 448 * 2.0**-10  # half of e4m3's least number
    assert (np.abs(found - new) <= near * step * (1 + 1e-5) + smallest).all()
    assert (found[0, 1, 2] == 0).all()


def test_numbers_at_both_ends_stay_finite():
    new = jnp.array([1e-45, 1e-38, 3e38, 0.0])[:, None] * jnp.ones(16)
    for dtype in (jnp.int8, jnp.int4, E4M3):
        cache = kv_cache.write(
            kv_cache.empty(SHAPE, dtype), 0, 0, jnp.tile(new, (3, 1, 1, 1))
        )
        assert np.isfinite(np.asarray(kv_cache.read(cache, 0, jnp.float32))).all()


def test_other_formats_are_refused():
    with pytest.raises(ValueError, match="int16 is not there"):
        kv_cache.empty(SHAPE, jnp.int16)
    with pytest.raises(ValueError, match="a cache of int3 channel is not there"):
        kv_cache.empty(SHAPE, Int(3))


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
    windows=(None, None),
)


@pytest.mark.parametrize(
    ("dtype", "near"), [(jnp.int8, 0.02), (jnp.float8_e4m3fn, 0.1)]
)
def test_a_model_decodes_with_it(dtype, near: float):
    """Logits move by the rounding of the cache, and not at all without one."""
    f, params = functional(llama.Llama(CONFIG, rngs=nnx.Rngs(0), scan_layers=True))
    params = jax.tree.map(
        lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape), params
    )
    tokens = jax.random.randint(jax.random.key(1), (2, 10), 0, 50)

    def last(dtype):
        cache = f.init_cache(2, 16, dtype)
        _, cache = jax.jit(f)(params, tokens[:, :9], cache)
        return jax.jit(f)(params, tokens[:, 9:], cache)[0][:, -1]

    whole = jax.jit(f)(params, tokens)[:, -1]
    spread = jnp.std(whole)
    np.testing.assert_allclose(last(jnp.float32), whole, atol=2e-5)
    assert jnp.abs(last(dtype) - whole).mean() < near * spread
    assert generate(f, params, tokens, 2).shape == (2, 12)
