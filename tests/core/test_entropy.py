"""Entropy calibration, against the reference's search in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from qjax.core.formats import Float, Int, tensor
from qjax.core.ranges import KLRange

pytestmark = pytest.mark.optimized


@partial(jax.jit, static_argnums=(0, 1))
def state_of(calibrator, format, x):
    statistic = calibrator.statistic(format)
    return statistic.update(statistic.init(x.shape[1]), x, jnp.ones(x.shape[0]))


@partial(jax.jit, static_argnums=(0, 1))
def settle(calibrator, format, state):
    return calibrator.grid(format, calibrator.statistic(format).finalize(state))


def equal_levels(kept, bits):
    """As many as an integer has magnitudes."""
    return np.arange(kept) * 2 ** (bits - 1) // kept


def e4m3_levels(kept, _):
    """The values that float8 rounds the centers of bins to."""
    centers = (np.arange(kept, dtype=np.float32) + np.float32(0.5)) / (
        np.float32(kept) / np.float32(448)
    )
    values = centers.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    return np.unique(values, return_inverse=True)[1]


def entropy_threshold(magnitudes, start, levels_of, bits):
    """pytorch-quantization's search, as its equations say, in float64.

    Returns the number of bins kept.
    """
    bins = magnitudes.astype(np.float64)
    bins[0] = bins[1]
    losses = []
    for kept in range(start, len(bins) + 1):
        data, model = bins[:kept].copy(), np.zeros(kept)
        level = levels_of(kept, bits)
        for number in range(level.max() + 1):
            filled = (level == number) & (bins[:kept] > 0)
            if filled.any():
                model[filled] = bins[:kept][filled].mean()
        data[-1] += bins[kept:].sum()
        p, q = data / data.sum(), model / model.sum()
        with np.errstate(divide="ignore"):
            losses.append(np.sum(p[p > 0] * np.log(p[p > 0] / q[p > 0])))
    losses = np.array(losses)
    return start + np.flatnonzero(losses == losses.min())[-1], losses


INPUTS = {
    "normal": lambda rng: rng.normal(size=(4000, 4)),
    "heavy": lambda rng: rng.standard_t(3, (4000, 4)),
    "relu": lambda rng: np.maximum(rng.normal(size=(4000, 4)), 0),
    "outliers": lambda rng: rng.normal(size=(4000, 4)) * [1, 1, 1, 20],
}


@pytest.mark.parametrize(
    ("format", "levels_of", "bits"),
    [
        (Int(4, tensor()), equal_levels, 4),
        (Int(8, tensor()), equal_levels, 8),
        (Float("e4m3", tensor()), e4m3_levels, 8),
    ],
    ids=["int4", "int8", "e4m3"],
)
@pytest.mark.parametrize("kind", INPUTS)
def test_entropy_search_is_the_references(kind, format, levels_of, bits):
    x = INPUTS[kind](np.random.default_rng(7)).astype(np.float32)
    calibrator = KLRange(bins=512, start=128)
    state = state_of(calibrator, format, x)
    magnitudes, limit = np.asarray(state.magnitudes()[0]), float(state.limit[0])
    last = np.flatnonzero(magnitudes)[-1] + 1
    kept, losses = entropy_threshold(magnitudes[:last], 128, levels_of, bits)
    top = min(kept * limit / 512, np.abs(x).max())
    largest = (2**bits - 1) / 2 if levels_of is equal_levels else 448
    scale = settle(calibrator, format, state).scale
    np.testing.assert_allclose(scale, top / largest, rtol=1e-6)
    assert (losses < losses[-1]).any() or kept == last
