"""Attention over caches of few bits, simulated strictly, against float64."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from qjax_kernels.kv_attention import Cached, reference

B, S, G, H, d = 3, 40, 2, 6, 128
SMALL = {"slots": 16, "tile": 16}
START = jnp.array([0, 3, 20], jnp.int32)
STOP = jnp.array([37, 9, 20], jnp.int32)  # the last sequence sees nothing


def drawn(dtype, tokens=None, zero=False, seed=0, heads=G, slots=S):
    draw = np.random.default_rng(seed)
    codes = draw.integers(-8, 8, (B, slots, heads, d))
    runs = (B, slots // (tokens or 1), heads, d)
    shape = (B, 1, slots * heads) if tokens is None else runs
    scale = draw.uniform(0.1, 0.3, shape).astype(np.float32)
    offset = draw.normal(0, 2, shape).astype(np.float32) if zero else None
    return Cached(
        jnp.asarray(codes, jnp.int8).astype(dtype),
        jnp.asarray(scale),
        None if offset is None else jnp.asarray(offset),
        tokens,
    )


def values_of(cached):
    """What the codes stand for, in float64."""
    codes = np.asarray(cached.codes.astype(jnp.float32), np.float64)

    def spread(x):
        x = np.asarray(x, np.float64)
        if cached.tokens is None:
            return x.reshape(*codes.shape[:3], 1)
        return np.repeat(x, cached.tokens, axis=1)

    zero = 0 if cached.zero is None else spread(cached.zero)
    return (codes - zero) * spread(cached.scale)


def exact(q, keys, values, start, stop, scale):
    """The result, and how far the rounding of operands to bfloat16 may move it."""
    k, v = values_of(keys), values_of(values)
    q = np.asarray(q, np.float64)
    out, moved = np.zeros(q.shape), np.zeros(q.shape)
    for b in range(q.shape[0]):
        seen = slice(int(start[b]), int(stop[b]))
        if seen.start >= seen.stop:
            continue
        for h in range(q.shape[1]):
            g = h // (q.shape[1] // k.shape[2])
            scores = k[b, seen, g] @ q[b, h] * scale
            weights = np.exp(scores - scores.max())
            weights /= weights.sum()
            out[b, h] = weights @ v[b, seen, g]
            codes = np.abs(v[b, seen, g])
            if values.zero is not None:
                codes = codes + np.abs(zeros_of(values)[b, seen, g])
            moved[b, h] = weights @ codes
    return out, moved


def zeros_of(cached):
    scale, zero = (np.asarray(x, np.float64) for x in (cached.scale, cached.zero))
    return 2 * (scale * zero).reshape(*cached.codes.shape[:3], 1)


CASES = {
    "int8": (drawn(jnp.int8), drawn(jnp.int8, seed=1)),
    "int4": (drawn(jnp.int4), drawn(jnp.int4, seed=1)),
    "e4m3": (drawn(jnp.float8_e4m3fn), drawn(jnp.float8_e4m3fn, seed=1)),
    "int4 zeros": (
        drawn(jnp.int4, zero=True),
        drawn(jnp.int4, zero=True, seed=1),
    ),
    "KIVI": (
        drawn(jnp.int4, tokens=8, zero=True),
        drawn(jnp.int4, zero=True, seed=1),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_float64(name, backend):
    keys, values = CASES[name]
    q = jax.random.normal(jax.random.key(0), (B, H, d), jnp.bfloat16)
    run = (q, keys, values, START, STOP)
    y = backend.run("kv_attention", *run, scale=0.02, dtype=jnp.float32, tpu=SMALL)
    y = np.asarray(y, np.float64)
    true, moved = exact(*run, 0.02)
    # Weights are rounded to bfloat16 once; of runs, so is `q` times the scales, whose
    # scores are about 1.
    steps = 4 if keys.tokens else 1
    assert np.isfinite(y).all()
    assert (np.abs(y - true) <= steps * 2.0**-8 * moved).all()
    assert (y[2] == 0).all()


@pytest.mark.parametrize("name", CASES)
def test_the_reference_equals_float64(name):
    keys, values = CASES[name]
    q = jax.random.normal(jax.random.key(0), (B, H, d))
    run = (q, keys, values, START, STOP)
    true, moved = exact(*run, 0.02)
    y = np.asarray(reference.kv_attention(*run, scale=0.02), np.float64)
    assert (np.abs(y - true) <= 2.0**-18 * moved).all()


def test_heads_alone_and_a_block_that_is_cut(backend):
    """One head of keys for all queries, slots that no block divides."""
    keys, values = (drawn(jnp.int8, heads=1, slots=33, seed=i) for i in (2, 3))
    q = jax.random.normal(jax.random.key(0), (B, 4, d), jnp.bfloat16)
    stop = jnp.array([33, 9, 1], jnp.int32)
    run = (q, keys, values, jnp.zeros(B, jnp.int32), stop)
    y = backend.run(
        "kv_attention", *run, scale=0.02, dtype=jnp.float32,
        tpu={"slots": 128, "tile": 128},
    )  # fmt: skip
    true, moved = exact(*run, 0.02)
    assert (np.abs(np.asarray(y, np.float64) - true) <= 2.0**-8 * moved).all()


@pytest.mark.parametrize("name", ["int8", "e4m3"])
def test_what_is_not_seen_is_not_read(name, backend):
    """NaN scales and codes outside of a sequence, and huge and zero scales inside."""
    keys, values = CASES[name]
    hidden = np.ones((B, S), bool)
    for b in range(B):
        hidden[b, int(START[b]) : int(STOP[b])] = False
    flat = np.repeat(hidden, G, axis=1)[:, None]

    def marred(cached, large):
        scale = np.array(cached.scale)
        scale[0, 0, :4], scale[0, 0, 4:6] = 0, large
        scale[flat] = np.nan
        codes = np.array(cached.codes)
        codes[1, 4] = 0
        if name == "e4m3":
            codes[hidden] = ml_dtypes.float8_e4m3fn(np.nan)
        return replace(cached, codes=jnp.asarray(codes), scale=jnp.asarray(scale))

    q = jax.random.normal(jax.random.key(0), (B, H, d), jnp.bfloat16)
    run = (q, marred(keys, 1e20), marred(values, 1e30), START, STOP)
    y = backend.run("kv_attention", *run, scale=0.02, dtype=jnp.float32, tpu=SMALL)
    assert np.isfinite(np.asarray(y)).all()


def test_what_does_not_agree_is_named():
    keys, values = CASES["int8"]
    q = jnp.ones((B, H, d))

    def run(q=q, keys=keys, values=values, stop=STOP):
        return reference.kv_attention(q, keys, values, START, stop, scale=1.0)

    with pytest.raises(ValueError, match=r"q has shape \(3, 5, 128\)"):
        run(q[:, :5])
    with pytest.raises(ValueError, match=r"stop is float32\[3\]; it must be int32"):
        run(stop=STOP.astype(jnp.float32))
    with pytest.raises(ValueError, match=r"keys\.scale is float32\[3, 40\]"):
        run(keys=replace(keys, scale=keys.scale[:, 0, :S]))
    with pytest.raises(ValueError, match=r"keys\.tokens is 7; it must divide the 40"):
        run(keys=replace(keys, tokens=7))
    with pytest.raises(ValueError, match=r"keys\.codes is uint8"):
        run(keys=replace(keys, codes=keys.codes.astype(jnp.uint8)))
    with pytest.raises(ValueError, match=r"values\.tokens is 8"):
        run(values=drawn(jnp.int4, tokens=8))
