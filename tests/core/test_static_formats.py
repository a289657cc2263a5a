"""Every calibrator with every format and granularity of a static activation."""

from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from qjax.core.formats import Float, Granularity, Int
from qjax.core.qtensor import Activation, SiteActs
from qjax.core.ranges import (
    KLRange,
    MinMaxRange,
    MovingAverageRange,
    MSERange,
    PercentileRange,
)
from qjax.ops.activations import code_input

K, M = 8, 200
X = np.random.default_rng(0).standard_t(4, (M, K)).astype(np.float32)
CALIBRATORS = {
    "minmax": MinMaxRange(),
    "moving": MovingAverageRange(),
    "percentile": PercentileRange(99, bins=64),
    "mse": MSERange(bins=64, start=16),
    "kl": KLRange(bins=64, start=16),
}
ROWS = {"tensor": None, "feature": 1, "group": 3}  # the last group has two features


@partial(jax.jit, static_argnums=(0, 1))
def grid_of(calibrator, format, x):
    statistic = calibrator.statistic(format)
    state = statistic.update(statistic.init(x.shape[1]), x, jnp.ones(x.shape[0]))
    return calibrator.grid(format, statistic.finalize(state))


def format_of(dtype, rows):
    each = Granularity(rows, None)
    return Float(dtype, each) if dtype == "e4m3" else Int(int(dtype[3:]), each)


@pytest.mark.parametrize("name", CALIBRATORS)
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("dtype", ["int8", "int4", "e4m3"])
def test_every_calibrator_serves_every_static_format(name, rows, dtype):
    """A block is calibrated as if alone; the input is coded on its blocks' scales."""
    calibrator, format = CALIBRATORS[name], format_of(dtype, rows)
    grid = grid_of(calibrator, format, X)
    width = rows or K
    assert grid.scale.shape == (-(-K // width), 1)
    one = grid_of(calibrator, format_of(dtype, None), X[:, :width])
    np.testing.assert_allclose(grid.scale[0], one.scale[0], rtol=1e-6)
    acts = SiteActs(grid.scale, activation=Activation(format, dynamic=False))
    got = code_input(jnp.asarray(X), acts).decode(jnp.float32)
    scale = np.repeat(np.asarray(grid.scale, np.float32), width, axis=0)[:K, 0]
    if dtype == "e4m3":
        codes = np.clip(X / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    else:
        half = 2 ** (int(dtype[3:]) - 1)
        codes = np.clip(np.round(X / scale), -half, half - 1)
    np.testing.assert_allclose(got, codes.astype(np.float32) * scale, rtol=1e-6)
