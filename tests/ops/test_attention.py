"""Attention to a coded cache, against attention to the floats that it holds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from qjax.core.formats import Float, Int
from qjax.ops import Target, kv_cache
from qjax.ops.attention import attend, attend_seen, attention_choice
from qjax_kernels.compat import interpret_params

B, S, G, H, d = 2, 32, 2, 4, 128
TPU = Target("tpu", "v5e")
START = jnp.array([2, 0], jnp.int32)
STOP = jnp.array([30, 5], jnp.int32)
FORMATS = [Int(8), Int(4), Float("e4m3")]


def filled(format, seed, size=1.0):
    """A cache with one layer, written in two steps, and the floats that it holds."""
    new = size * jax.random.normal(jax.random.key(seed), (B, 30, G, d))
    cache = kv_cache.empty((1, B, S, G, d), format)
    cache = kv_cache.write(cache, 0, 0, new[:, :29])
    cache = kv_cache.write(cache, 0, 29, new[:, 29:])
    return cache.layer(0), np.asarray(kv_cache.read(cache, 0, jnp.float32), np.float64)


WHOLE = (np.arange(S) >= START[:, None]) & (np.arange(S) < STOP[:, None])


def softmax_attention(q, k, v, scale, slots=WHOLE):
    """In float64, one sequence and head at a time."""
    out, size = np.zeros(q.shape), np.zeros(q.shape)
    for b in range(B):
        seen = np.asarray(slots[b])
        for h in range(H):
            keys, values = k[b, seen, h * G // H], v[b, seen, h * G // H]
            weights = np.exp(keys @ np.asarray(q[b, h], np.float64) * scale)
            weights /= weights.sum()
            out[b, h], size[b, h] = weights @ values, weights @ np.abs(values)
    return out, size


@pytest.mark.parametrize(
    ("format", "implementation"),
    [(format, "xla") for format in FORMATS] + [(f, "pallas") for f in FORMATS[:2]],
    ids=lambda part: getattr(part, "name", part),
)
def test_equals_attention_to_what_the_cache_holds(format, implementation):
    (keys, k), (values, v) = filled(format, 0), filled(format, 1)
    q = jax.random.normal(jax.random.key(2), (B, H, d), jnp.bfloat16)
    pltpu.reset_tpu_interpret_mode_state()
    with pltpu.force_tpu_interpret_mode(interpret_params()):
        y = attend(
            q, keys, values, START, STOP, scale=d**-0.5,
            implementation=implementation, target=TPU,
        )  # fmt: skip
    true, size = softmax_attention(q, k, v, d**-0.5)
    # Weights and the result are rounded to bfloat16.
    assert (np.abs(np.asarray(y, np.float64) - true) <= 2.0**-7 * size).all()


@pytest.mark.parametrize("hole", [False, True])
def test_any_slots_may_be_seen(hole):
    """The kernel runs where they lie side by side; both ways are in one program."""
    (keys, k), (values, v) = filled(Int(8), 0), filled(Int(8), 1)
    q = jax.random.normal(jax.random.key(2), (B, H, d), jnp.bfloat16)
    seen = jnp.asarray(WHOLE).at[0, 7].set(not hole)
    pltpu.reset_tpu_interpret_mode_state()
    with pltpu.force_tpu_interpret_mode(interpret_params()):
        y = attend_seen(q, keys, values, seen, scale=d**-0.5, target=TPU)
    true, size = softmax_attention(q, k, v, d**-0.5, seen)
    assert (np.abs(np.asarray(y, np.float64) - true) <= 2.0**-7 * size).all()


def test_float32_and_no_tokens():
    keys, k = filled(Int(8), 0)
    values, v = filled(Int(8), 1)
    q = jax.random.normal(jax.random.key(2), (B, H, d))
    y = attend(q, keys, values, START, STOP, scale=0.1)
    true, size = softmax_attention(q, k, v, 0.1)
    assert (np.abs(np.asarray(y) - true) <= 1e-5 * size).all()
    empty = attend(q, keys, values, STOP, STOP, scale=0.1)
    assert (np.asarray(empty) == 0).all()


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)
def test_small_values_in_float16(format):
    """Weights times scales are below float16's range, the result is within it."""
    (keys, k), (values, v) = filled(format, 0), filled(format, 1, 1e-4)
    q = jax.random.normal(jax.random.key(2), (B, H, d), jnp.float16)
    y = attend(q, keys, values, START, STOP, scale=d**-0.5)
    true, size = softmax_attention(q, k, v, d**-0.5)
    assert y.dtype == jnp.float16
    # The result is rounded to float16, whose numbers lie 2**-24 apart here at least.
    rounding = np.maximum(2.0**-11 * np.abs(true), 2.0**-25)
    assert (np.abs(np.asarray(y, np.float64) - true) <= rounding + 1e-5 * size).all()


def test_a_refusal_says_why():
    keys, _ = filled(Int(8), 0)
    q = jnp.ones((B, H, d), jnp.bfloat16)
    assert attention_choice(q, keys, "auto", TPU).name == "pallas v5e"
    e4m3, _ = filled(Float("e4m3"), 0)
    assert (
        "with float8_e4m3fn the kernel is not known"
        in attention_choice(q, e4m3, "auto", TPU).refused
    )
    cases = [
        (q, Target("cpu"), "there is no kernel for cpu"),
        (q, Target("tpu", "v6e", 4), "use shard_map"),
        (q.astype(jnp.float32), TPU, "the queries are float32"),
    ]
    for query, target, why in cases:
        assert why in attention_choice(query, keys, "auto", target).refused
        with pytest.raises(ValueError, match=why):
            attention_choice(query, keys, "pallas", target)
