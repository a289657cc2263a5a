"""Statistics: what numpy says of the tokens that count, whatever the batches."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.core.histogram import Histogram, Quantile
from qjax.core.reservoir import Reservoir
from qjax.core.statistics import (
    AbsMaximum,
    Cross,
    Hessian,
    Interval,
    Mean,
    MeanAbs,
    MovingRange,
    Range,
    SecondMoment,
)

K, M = 6, 40
RNG = np.random.default_rng(0)
X = RNG.standard_t(3, (M, K)).astype(np.float32)
FULL = X + 0.1 * RNG.normal(size=(M, K)).astype(np.float32)
WEIGHT = (RNG.random(M) < 0.7).astype(np.float32)
ONES = np.ones(M, np.float32)
KEPT = X[WEIGHT > 0]

EXACT = {
    "absmax": AbsMaximum(),
    "range": Range(),
    "histogram": Histogram(bins=64, rows=4),
    "reservoir": Reservoir(8, seed=3),
}
SUMS = {
    "mean": Mean(),
    "mean_abs": MeanAbs(),
    "second_moment": SecondMoment(),
    "hessian": Hessian(),
    "cross": Cross(),
}
ALL = EXACT | SUMS | {"moving": MovingRange(0.1, rows=2)}
every = pytest.mark.parametrize("name", ALL)


@partial(jax.jit, static_argnums=0)
def step(statistic, state, x, weight, full):
    return statistic.update(state, x, weight, full)


@partial(jax.jit, static_argnums=0)
def finish(statistic, state):
    return statistic.finalize(state)


def state_of(statistic, *batches):
    state = statistic.init(batches[0][0].shape[1])
    for x, weight, full in batches:
        state = step(statistic, state, x, weight, X if full is None else full)
    return state


def final(statistic, *batches):
    return finish(statistic, state_of(statistic, *batches))


def assert_same(a, b, rtol=0.0):
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    for x, y in leaves:
        assert x.dtype == y.dtype
        np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol)


@every
def test_tokens_of_weight_zero_never_enter(name):
    garbage = np.where(WEIGHT[:, None] > 0, X, np.nan)
    got = final(ALL[name], (garbage, WEIGHT, np.where(garbage == X, FULL, np.inf)))
    want = final(ALL[name], (KEPT, ONES[: len(KEPT)], FULL[WEIGHT > 0]))
    assert_same(got, want, rtol=1e-5 if name in SUMS else 0)


@every
def test_a_batch_without_tokens_changes_nothing(name):
    nothing = np.full_like(X, np.nan), np.zeros(M, np.float32), FULL
    one = X, WEIGHT, FULL
    assert_same(final(ALL[name], one, nothing), final(ALL[name], one))
    empty = final(ALL[name], nothing)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(empty))


@pytest.mark.parametrize("name", EXACT | SUMS)
def test_batches_can_be_cut_anywhere(name):
    want = final(ALL[name], (X, WEIGHT, FULL))
    parts = [np.split(each, 4) for each in (X, WEIGHT, FULL)]
    got = final(ALL[name], *zip(*parts))
    assert_same(got, want, rtol=1e-5 if name in SUMS else 0)


@pytest.mark.parametrize("name", [n for n in ALL if n != "reservoir"])
def test_merging_is_one_pass_over_both(name):
    statistic, parts = (
        ALL[name],
        list(zip(*(np.split(v, 4) for v in (X, WEIGHT, FULL)))),
    )
    halves = [state_of(statistic, *half) for half in (parts[:2], parts[2:])]
    got = finish(statistic, jax.jit(statistic.merge)(*halves))
    assert_same(got, final(statistic, *parts), rtol=0 if name in EXACT else 1e-5)


@every
def test_experts_are_mapped(name):
    masks = np.stack([WEIGHT, 1 - WEIGHT, 0 * WEIGHT])
    statistic, x, full = ALL[name], jnp.asarray(X), jnp.asarray(FULL)

    def whole(mask):
        return statistic.finalize(statistic.update(statistic.init(K), x, mask, full))

    mapped = jax.jit(jax.vmap(whole))(jnp.asarray(masks))
    for e, mask in enumerate(masks):
        one = final(statistic, (X, mask, FULL))
        assert_same(jax.tree.map(lambda leaf, e=e: leaf[e], mapped), one, rtol=1e-5)


@every
def test_what_is_not_finite_can_be_seen(name):
    for bad in (np.nan, np.inf, -np.inf):
        spoilt = X.copy()
        spoilt[3, 2] = bad
        leaves = jax.tree.leaves(final(ALL[name], (spoilt, ONES, FULL)))
        assert not all(np.isfinite(leaf).all() for leaf in leaves)
        later = jax.tree.leaves(final(ALL[name], (spoilt, ONES, FULL), (X, ONES, FULL)))
        assert not all(np.isfinite(leaf).all() for leaf in later)


@every
def test_bfloat16_inputs_and_strict_promotion(name, strict):
    x = jnp.asarray(X, jnp.bfloat16)
    got = final(ALL[name], (x, jnp.asarray(WEIGHT), x))
    wide = x.astype(jnp.float32)
    assert_same(got, final(ALL[name], (wide, jnp.asarray(WEIGHT), wide)))


def test_sums_are_those_of_numpy():
    kept, drift = KEPT.astype(np.float64), (FULL - X)[WEIGHT > 0].astype(np.float64)
    want = {
        "mean": kept.mean(0),
        "mean_abs": np.abs(kept).mean(0),
        "second_moment": (kept**2).mean(0),
        "hessian": kept.T @ kept / len(kept),
        "cross": drift.T @ kept / len(kept),
    }
    for name, value in want.items():
        got = final(ALL[name], (X, WEIGHT, FULL))
        np.testing.assert_allclose(got, value, rtol=1e-5, atol=1e-6)


def test_extremes_are_those_of_numpy():
    got = final(AbsMaximum(), (X, WEIGHT, FULL))
    np.testing.assert_array_equal(got, np.abs(KEPT).max(0))
    ends = final(Range(), (X, WEIGHT, FULL))
    np.testing.assert_array_equal(ends.low, KEPT.min(0))
    np.testing.assert_array_equal(ends.high, KEPT.max(0))


def test_histogram_is_that_of_numpy():
    counts = final(EXACT["histogram"], (X * np.float32(1.7), WEIGHT, FULL))
    for block, of in enumerate((KEPT[:, :4], KEPT[:, 4:])):
        limit, of = float(counts.limit[block]), of * np.float32(1.7)
        largest = np.abs(of).max()
        assert largest <= limit < 2 * largest and np.log2(limit) % 1 == 0
        want, _ = np.histogram(of, 64, (-limit, limit))
        np.testing.assert_array_equal(counts.counts[block], want)
        want, _ = np.histogram(np.abs(of), 32, (0, limit))
        np.testing.assert_array_equal(counts.magnitudes()[block], want)


def test_values_on_bin_edges_are_counted_alike_on_both_sides():
    # bfloat16 activations lie on edges all the time.
    x = np.array([[-4, -3, -2, -1, 0, 1, 2, 3, 4]], np.float32).T
    state = state_of(Histogram(bins=8), (x, ONES[:9], x))
    want = [2, 1, 1, 0, 1, 1, 1, 2]  # -1 is in the second bin below zero
    np.testing.assert_array_equal(state.counts[0], want)
    np.testing.assert_array_equal(state.magnitudes()[0], [1, 2, 2, 4])


def test_a_wider_range_merges_pairs_of_bins():
    statistic = EXACT["histogram"]
    growing = [X * np.float32(4.0**i) for i in range(5)]
    orders = [growing, growing[::-1]]
    results = [final(statistic, *((x, ONES, None) for x in o)) for o in orders]
    assert_same(*results)
    every = np.concatenate(growing)
    for block, of in enumerate((every[:, :4], every[:, 4:])):
        limit = float(results[0].limit[block])
        want, _ = np.histogram(np.abs(of), 32, (0, limit))
        np.testing.assert_array_equal(results[0].magnitudes()[block], want)


@pytest.mark.parametrize("size", [0.0, 1e-37, 1e-3, 3e38])
def test_histogram_at_the_ends_of_float32(size):
    x = (np.linspace(-1, 1, M * K, dtype=np.float32) * np.float32(size)).reshape(M, K)
    counts = final(EXACT["histogram"], (x, ONES, None))
    assert counts.counts.sum() == M * K
    np.testing.assert_array_equal(counts.absmax().max(), np.abs(x).max())
    assert np.isfinite(counts.limit).all()


@pytest.mark.parametrize("p", [75, 99.9, 100])
def test_percentiles_lie_within_a_bin_of_numpys(p):
    x = np.random.default_rng(5).standard_t(4, (160, 4)).astype(np.float32)
    parts = [(part, ONES, X) for part in np.split(x, 4)]
    state = state_of(Histogram(bins=512, rows=2), *parts)
    ends = finish(Quantile(bins=512, rows=2, p=p), state)
    width = np.asarray(state.width())
    for block in range(2):
        of = x[:, 2 * block : 2 * block + 2]
        low, high = np.percentile(of, [100 - p, p])
        assert abs(float(ends.low[block]) - low) <= width[block]
        assert abs(float(ends.high[block]) - high) <= width[block]
        if p == 100:
            assert (float(ends.low[block]), float(ends.high[block])) == (low, high)


def test_moving_range_is_the_recursion_of_the_definition():
    batches = [X * s for s in (1.0, 3.0, 0.2, 1.5)]
    low, high = (np.array([f(batches[0][:, k : k + 2]) for k in (0, 2, 4)])
                 for f in (np.min, np.max))  # fmt: skip
    for x in batches[1:]:
        low += 0.1 * (np.array([x[:, k : k + 2].min() for k in (0, 2, 4)]) - low)
        high += 0.1 * (np.array([x[:, k : k + 2].max() for k in (0, 2, 4)]) - high)
    got = final(ALL["moving"], *((x.astype(np.float32), ONES, None) for x in batches))
    assert isinstance(got, Interval)
    np.testing.assert_allclose(got.low, low, rtol=1e-5)
    np.testing.assert_allclose(got.high, high, rtol=1e-5)


def test_reservoir_holds_distinct_tokens_that_count():
    x = np.arange(200, dtype=np.float32)[:, None] * np.ones(K, np.float32)
    weight = (np.arange(200) % 3 > 0).astype(np.float32)
    sample = final(Reservoir(50), (x, weight, x))
    chosen = np.asarray(sample.rows[:, 0]).astype(int)
    assert len(set(chosen)) == 50 and (chosen % 3 > 0).all()
    np.testing.assert_array_equal(sample.rows, x[chosen])
    np.testing.assert_array_equal(sample.weight, np.ones(50))
    few = final(Reservoir(50), (x[:20], weight[:20], x[:20]))
    assert few.weight.sum() == weight[:20].sum()
    assert not few.rows[few.weight == 0].any()


def test_reservoir_draws_uniformly():
    statistic, draws = Reservoir(10), 400
    numbers = jnp.arange(40, dtype=jnp.float32)[:, None]

    @jax.jit
    @jax.vmap
    def chosen(gone):  # where the stream stands is what a seed moves, too
        state = replace(statistic.init(1), seen=gone)
        return statistic.update(state, numbers, jnp.ones(40)).rows[:, 0]

    found = np.asarray(chosen(jnp.arange(draws, dtype=jnp.uint32) * 40)).astype(int)
    hits = np.bincount(found.ravel(), minlength=40)
    # Each token in a quarter of the draws; 5 standard deviations of that count.
    assert np.abs(hits - draws / 4).max() < 5 * np.sqrt(draws * 3 / 16)


def test_merged_reservoirs_keep_the_largest_priorities_of_all():
    parts = [(Reservoir(8, seed=s), X[10 * s : 10 * s + 10]) for s in range(4)]
    states = [state_of(r, (x, ONES[:10], x)) for r, x in parts]
    merge = Reservoir(8).merge
    left = merge(merge(states[0], states[1]), merge(states[2], states[3]))
    right = merge(states[3], merge(merge(states[2], states[0]), states[1]))
    assert_same(left, right)
    every = np.concatenate([s.priority for s in states])
    np.testing.assert_array_equal(left.priority, np.sort(every)[::-1][:8])
    owners = {tuple(row) for s in states for row in np.asarray(s.rows)}
    assert all(tuple(row) in owners for row in np.asarray(left.rows))


BAD = [
    (MovingRange, {"rate": 0}, r"MovingRange.rate must be in \(0, 1\], got 0"),
    (MovingRange, {"rows": 0}, "MovingRange.rows must be a whole number >= 1"),
    (Histogram, {"bins": 100}, "Histogram.bins must be a power of two >= 4, got 100"),
    (Histogram, {"rows": -1}, "Histogram.rows"),
    (Quantile, {"p": 50}, r"Quantile.p must be in \(50, 100\] percent, got 50"),
    (Reservoir, {"size": 0}, "Reservoir.size must be a whole number >= 1, got 0"),
    (Reservoir, {"seed": -1}, "Reservoir.seed must be a whole number >= 0, got -1"),
]


@pytest.mark.parametrize(("kind", "fields", "message"), BAD)
def test_bad_fields_are_named(kind, fields, message):
    with pytest.raises(ValueError, match=message):
        kind(**fields)
