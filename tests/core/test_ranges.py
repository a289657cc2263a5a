"""Static ranges: those of PyTorch's observers and of the reference searches."""

from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from qjax.core.coded import encode
from qjax.core.formats import (
    MX,
    NVFP4,
    Codebook,
    Float,
    Granularity,
    Int,
    block,
    channel,
    tensor,
    token,
)
from qjax.core.layout import Layout
from qjax.core.qtensor import Activation, QTensor, SiteActs
from qjax.core.ranges import (
    Calibrator,
    KLRange,
    MinMaxRange,
    MovingAverageRange,
    MSERange,
    PercentileRange,
    calibrator_of,
    check_calibrator,
)
from qjax.ops import matmul
from qjax.ops.activations import code_input

pytestmark = pytest.mark.optimized

K, M = 8, 200
X = np.random.default_rng(0).standard_t(4, (3, M, K)).astype(np.float32)
X[..., 3] = np.abs(X[..., 3]) + 0.5  # a feature that is never negative
ONES = np.ones(M, np.float32)
CALIBRATORS = {
    "minmax": MinMaxRange(),
    "moving": MovingAverageRange(),
    "percentile": PercentileRange(99, bins=64),
    "mse": MSERange(bins=64, start=16),
    "kl": KLRange(bins=64, start=16),
}
every = pytest.mark.parametrize("name", CALIBRATORS)
SYM, ASYM = Int(8, tensor()), Int(8, tensor(), symmetric=False)


@partial(jax.jit, static_argnums=0)
def step(statistic, state, x):
    return statistic.update(state, x, jnp.ones(x.shape[0]))


@partial(jax.jit, static_argnums=(0, 1))
def settle(calibrator, format, state):
    return calibrator.grid(format, calibrator.statistic(format).finalize(state))


def state_of(calibrator, format, batches):
    statistic = calibrator.statistic(format)
    state = statistic.init(batches[0].shape[1])
    for x in batches:
        state = step(statistic, state, x)
    return state


def grid_of(calibrator, format, batches=X):
    return settle(calibrator, format, state_of(calibrator, format, batches))


def observed(name, **fields):
    torch = pytest.importorskip("torch")
    from torch.ao.quantization import observer

    fields = {k: getattr(torch, v) if k != "ch_axis" else v for k, v in fields.items()}
    seen = getattr(observer, name)(**fields)
    for x in X:
        seen(torch.from_numpy(x))
    scale, zero = seen.calculate_qparams()
    return scale.numpy(), zero.numpy()


@pytest.mark.parametrize(
    ("calibrator", "name"),
    [
        (MinMaxRange(), "MinMaxObserver"),
        (MovingAverageRange(), "MovingAverageMinMaxObserver"),
    ],
)
def test_tensor_ranges_are_those_of_torch(calibrator, name):
    scale, zero = observed(name, dtype="quint8", qscheme="per_tensor_affine")
    grid = grid_of(calibrator, ASYM)
    assert grid.scale.shape == grid.zero.shape == (1, 1)
    np.testing.assert_allclose(grid.scale[0], scale, rtol=1e-6)
    np.testing.assert_array_equal(grid.zero[0], zero)
    scale, _ = observed(name, dtype="qint8", qscheme="per_tensor_symmetric")
    np.testing.assert_allclose(grid_of(calibrator, SYM).scale[0], scale, rtol=1e-6)


def test_feature_ranges_are_those_of_torch():
    fields = {"dtype": "quint8", "qscheme": "per_channel_affine", "ch_axis": 1}
    scale, zero = observed("PerChannelMinMaxObserver", **fields)
    grid = grid_of(MinMaxRange(), Int(8, block(1, None), symmetric=False))
    np.testing.assert_allclose(grid.scale[:, 0], scale, rtol=1e-6)
    np.testing.assert_array_equal(grid.zero[:, 0], zero)


def test_histogram_is_that_of_torchs_observer():
    torch = pytest.importorskip("torch")
    from torch.ao.quantization import HistogramObserver

    x = np.clip(X[0], -4, 4)
    x[0, :2] = -4, 4  # so that both cut [-4, 4]
    seen = HistogramObserver(bins=256)
    seen(torch.from_numpy(x))
    counts = state_of(PercentileRange(bins=128), SYM, [x])
    np.testing.assert_array_equal(counts.counts[0], seen.histogram.numpy())


def test_percentiles_are_those_of_numpy(p=99.9):
    every = X.reshape(-1)
    calibrator = PercentileRange(p)
    width = 2 * np.abs(every).max() / 2048
    top = np.percentile(np.abs(every), p)
    grid = grid_of(calibrator, SYM)
    assert abs(float(grid.scale[0, 0]) * 127.5 - top) <= width
    low, high = np.percentile(every, [100 - p, p])
    grid = grid_of(calibrator, ASYM)
    assert abs(float(grid.scale[0, 0]) * 255 - (high - low)) <= 2 * width
    assert abs(float(grid.zero[0, 0]) + low / float(grid.scale[0, 0])) <= 1
    whole, minmax = (grid_of(c, ASYM) for c in (PercentileRange(100), MinMaxRange()))
    np.testing.assert_array_equal(whole.scale, minmax.scale)


INPUTS = {
    "normal": lambda rng: rng.normal(size=(4000, 4)),
    "heavy": lambda rng: rng.standard_t(3, (4000, 4)),
    "relu": lambda rng: np.maximum(rng.normal(size=(4000, 4)), 0),
    "outliers": lambda rng: rng.normal(size=(4000, 4)) * [1, 1, 1, 20],
}


def narrow_int8(x, top):
    return np.clip(np.round(x * 127 / top), -127, 127) * top / 127


def e4m3(x, top):
    codes = np.clip(x * 448 / top, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    return codes.astype(np.float64) * top / 448


@pytest.mark.parametrize(
    ("format", "quantize", "largest"),
    [
        (Int(8, tensor(), scale_rule="narrow"), narrow_int8, 127),
        (Float("e4m3", tensor()), e4m3, 448),
    ],
    ids=["int8", "e4m3"],
)
@pytest.mark.parametrize("kind", INPUTS)
def test_squared_error_search_is_the_references(kind, format, quantize, largest):
    x = INPUTS[kind](np.random.default_rng(8)).astype(np.float32)
    calibrator = MSERange(bins=512, start=64)
    state = state_of(calibrator, format, [x])
    limit, absmax = float(state.limit[0]), np.abs(x).max()
    counts = np.asarray(state.magnitudes()[0], np.float64)
    centers = (np.arange(512) + 0.5) * limit / 512
    tops = np.minimum(np.append(centers[64:], absmax), absmax)
    errors = [np.sum((quantize(centers, t) - centers) ** 2 * counts) for t in tops]
    found = float(settle(calibrator, format, state).scale[0, 0]) * largest
    error = np.sum((quantize(centers, found) - centers) ** 2 * counts)
    # Float32 sums may prefer a neighbour that is as good.
    assert error <= min(errors) * (1 + 1e-5)


def test_searches_lose_less_than_the_whole_range():
    x = INPUTS["outliers"](np.random.default_rng(9)).astype(np.float32)
    x[:, 3] /= 20
    x[0, 3] = 30  # one value of 16000
    format = Int(4, tensor())

    def error(calibrator):
        acts = SiteActs(
            scale=grid_of(calibrator, format, [x]).scale,
            activation=Activation(format, dynamic=False),
        )
        values = code_input(jnp.asarray(x), acts).decode(jnp.float32)
        return float(jnp.mean(jnp.square(values - x)[1:]))

    whole = error(MinMaxRange())
    for calibrator in (MSERange(), KLRange(), PercentileRange(99.9)):
        assert error(calibrator) < 0.1 * whole


@every
def test_each_group_of_features_has_its_own_range(name):
    calibrator, rows = CALIBRATORS[name], 3  # of 8 features: the last group is smaller
    format = Int(8, Granularity(rows, None), symmetric=False)
    grid = grid_of(calibrator, format)
    assert grid.scale.shape == (-(-K // rows), 1)
    one = grid_of(calibrator, ASYM, X[..., 6:])
    np.testing.assert_allclose(grid.scale[2], one.scale[0], rtol=1e-6)
    np.testing.assert_array_equal(grid.zero[2], one.zero[0])


@every
def test_what_is_not_finite_marks_the_grid(name):
    for bad in (np.nan, np.inf, -np.inf):
        x = X[0].copy()
        x[5, 2] = bad
        grid = grid_of(CALIBRATORS[name], SYM, [x, X[1], X[2]])
        assert not np.isfinite(grid.scale).any()


@every
def test_zeros_alone_make_a_grid(name):
    grid = grid_of(CALIBRATORS[name], SYM, [np.zeros((M, K), np.float32)])
    assert np.isfinite(grid.scale).all() and (grid.scale > 0).all()


@pytest.mark.parametrize("name", ["percentile", "kl"])
def test_experts_are_mapped(name):
    calibrator = CALIBRATORS[name]
    statistic = calibrator.statistic(ASYM)

    @jax.jit
    @jax.vmap
    def whole(x):
        state = statistic.update(statistic.init(K), x, jnp.ones(M))
        return calibrator.grid(ASYM, statistic.finalize(state))

    grids = whole(jnp.asarray(X))
    for expert, x in enumerate(X):
        one = grid_of(calibrator, ASYM, [x])
        np.testing.assert_allclose(grids.scale[expert], one.scale, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["e4m3", "e5m2"])
def test_float8_reaches_the_largest_value(dtype):
    largest = {"e4m3": 448, "e5m2": 57344}[dtype]
    grid = grid_of(MinMaxRange(), Float(dtype, tensor()))
    np.testing.assert_allclose(grid.scale, [[np.abs(X).max() / largest]], rtol=1e-6)


def nvfp4(x, global_scale):
    """compressed-tensors' equations for blocks of 16 along the last axis, float32."""
    blocks = x.reshape(*x.shape[:-1], -1, 16)
    absmax = np.abs(blocks).max(-1, keepdims=True)
    scale = np.clip(absmax / np.float32(6) * global_scale, 0, 448)
    scale = scale.astype(ml_dtypes.float8_e4m3fn).astype(np.float32) / global_scale
    scale = np.where(scale == 0, 1, scale)
    codes = np.clip(blocks / scale, -6, 6).astype(ml_dtypes.float4_e2m1fn)
    return (codes.astype(np.float32) * scale).reshape(x.shape)


@pytest.mark.parametrize("gain", [0.3, 1.0, 40.0])
def test_nvfp4_has_a_static_global_scale_and_dynamic_blocks(gain):
    x = np.random.default_rng(1).normal(size=(3, M, 64)).astype(np.float32)
    grid = grid_of(MinMaxRange(), NVFP4(), x)
    assert grid.scale is None and grid.global_scale.shape == (1, 1)
    np.testing.assert_allclose(grid.global_scale, 448 * 6 / np.abs(x).max(), rtol=1e-6)
    acts = SiteActs(
        activation=Activation(NVFP4(), dynamic=False), global_scale=grid.global_scale
    )
    later = x[0] * np.float32(gain)  # at 40 the blocks exceed what was calibrated
    values = code_input(jnp.asarray(later), acts).decode(jnp.float32)
    want = nvfp4(later, np.asarray(grid.global_scale))
    np.testing.assert_allclose(values, want, rtol=1e-6)
    w = np.random.default_rng(2).normal(size=(64, 5)).astype(np.float32)
    q = QTensor.of(
        encode(jnp.asarray(w), NVFP4()), Layout("kn", (64, 5)), jnp.float32, (acts,)
    )
    y = matmul(jnp.asarray(later), q)
    np.testing.assert_allclose(
        y, want @ np.asarray(q.dequantize()), rtol=1e-4, atol=1e-4 * gain
    )
    missing = SiteActs(activation=Activation(NVFP4(), dynamic=False))
    with pytest.raises(ValueError, match="nvfp4 is static but has no global scale"):
        code_input(jnp.asarray(later), missing)


@pytest.mark.parametrize("rows", [None, 1, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_static_grid_serves_its_site(rows, symmetric):
    format = Int(8, Granularity(rows, None), symmetric=symmetric)
    grid = grid_of(MinMaxRange(), format)
    acts = SiteActs(grid.scale, grid.zero, activation=Activation(format, dynamic=False))
    w = np.random.default_rng(2).normal(size=(K, 5)).astype(np.float32)
    coded = encode(jnp.asarray(w), Int(8, channel()))
    q = QTensor.of(coded, Layout("kn", (K, 5)), jnp.float32, (acts,))
    each = [
        None if g is None else np.asarray(g, np.float64)
        for g in (grid.scale, grid.zero)
    ]
    spread = np.repeat(each[0], rows or K, axis=0)[:K, 0]
    zero = 128.0 if symmetric else np.repeat(each[1], rows or K, axis=0)[:K, 0]
    codes = np.clip(np.round(X[0] / spread + zero), 0, 255)
    want = ((codes - zero) * spread) @ np.asarray(q.dequantize())
    y = matmul(jnp.asarray(X[0]), q)
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-4)
    assert np.abs(want - X[0] @ w).max() < 0.05 * np.abs(want).max()


REFUSED = [
    (MinMaxRange(), Int(8, token()), "int8 channel: its scales belong to single token"),
    (PercentileRange(), MX("fp4"), "only Int, Float and NVFP4 have a static range"),
    (MovingAverageRange(), Codebook("nf4"), "only Int, Float and NVFP4"),
    (KLRange(), NVFP4(), "KLRange cannot calibrate nvfp4"),
    (MSERange(), NVFP4(), "MSERange cannot calibrate nvfp4"),
]


@pytest.mark.parametrize(("calibrator", "format", "message"), REFUSED)
def test_formats_without_such_a_range_are_refused(calibrator, format, message):
    with pytest.raises(ValueError, match=message):
        calibrator.statistic(format)


BAD = [
    (MovingAverageRange, {"rate": 1.5}, r"MovingAverageRange.rate .* got 1.5"),
    (PercentileRange, {"p": 10}, r"PercentileRange.p must be in \(50, 100\]"),
    (PercentileRange, {"bins": 1000}, "PercentileRange.bins must be a power of two"),
    (MSERange, {"start": 0}, "MSERange.start must be a whole number from 1 to 2048"),
    (KLRange, {"stride": 0}, "KLRange.stride must be a whole number from 1"),
    (KLRange, {"bins": 64}, r"KLRange.start must be .* 1 to 64 \(bins\), got 128"),
]


@pytest.mark.parametrize(("kind", "fields", "message"), BAD)
def test_bad_fields_are_named(kind, fields, message):
    with pytest.raises(ValueError, match=message):
        kind(**fields)


def test_what_is_no_calibrator_is_refused():
    for wrong in ("minmax", MinMaxRange, None):
        with pytest.raises(TypeError, match=r"X.calibrator must be .* MinMaxRange\(\)"):
            check_calibrator("X", wrong, None)
    assert all(isinstance(c, Calibrator) for c in CALIBRATORS.values())
    assert len(set(CALIBRATORS.values())) == len(CALIBRATORS)


def test_a_method_names_its_calibrator_or_takes_the_default():
    class Method:
        activation = Activation(SYM, dynamic=False)
        calibrator = KLRange()

    assert calibrator_of(Method()) == KLRange()
    Method.calibrator = None
    assert calibrator_of(Method()) == MinMaxRange()
    Method.activation = Activation(Int(8, token()))
    assert calibrator_of(Method()) is None
