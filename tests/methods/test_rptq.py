"""RPTQ: clusters of features, contiguous, each with one static grid."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.core.formats import NVFP4, Int, channel, group, tensor
from qjax.core.qtensor import Activation
from qjax.core.statistics import Interval
from qjax.core.transforms import Diagonal, Permutation
from qjax.methods import RTN
from qjax.methods.base import Calibrated, Solution
from qjax.methods.gptq import GPTQ
from qjax.methods.rptq import RPTQ, cluster_grid, clustered, reordered
from qjax.quantize import quantize_with_report
from qjax.trace.apply import apply

pytestmark = pytest.mark.optimized

sklearn_cluster = pytest.importorskip("sklearn.cluster")

K, N, M = 96, 32, 256
RNG = np.random.default_rng(0)
W = jnp.asarray(RNG.normal(size=(K, N)) / 10, jnp.float32)
SIZE = np.where(RNG.random(K) < 0.08, 60.0, 1.0) * np.exp(0.7 * RNG.normal(size=K))
X = jnp.asarray(RNG.normal(size=(M, K)) * SIZE + SIZE * RNG.normal(size=K), jnp.float32)
INT8 = RTN(weights=Int(8))


def linear(params, x):
    return x @ params["w"]


def quantized(method, w=W, x=X):
    q, report = quantize_with_report(
        linear, {"w": w}, method, [(x[:100],), (x[100:],)], progress=False
    )
    return q, report


def error(q, x=X):
    exact = np.asarray(x, np.float64) @ np.asarray(W, np.float64)
    found = jax.jit(apply(linear))(q, x)
    return np.linalg.norm(found - exact) / np.linalg.norm(exact)


def spread(points, labels):
    """Squared distance of the points from the means of their clusters."""
    return sum(
        np.square(points[labels == c] - points[labels == c].mean(0)).sum()
        for c in np.unique(labels)
    )


@pytest.mark.parametrize("clusters", [2, 4, 16])
def test_clusters_are_as_tight_as_those_of_ten_random_starts(clusters):
    low, high = X.min(0), X.max(0)
    labels = np.asarray(
        jax.jit(clustered, static_argnums=(2, 3))(low, high, clusters, 50)
    )
    points = np.stack([high, low], 1).astype(np.float64)
    best = sklearn_cluster.KMeans(clusters, n_init=10, random_state=0).fit(points)
    assert spread(points, labels) <= 1.1 * best.inertia_
    again = clustered(low, high, clusters, 50)
    np.testing.assert_array_equal(labels, again)


def test_clusters_are_numbered_by_width():
    low, high = X.min(0), X.max(0)
    labels = np.asarray(clustered(low, high, 6, 50))
    widths = [np.asarray(high - low)[labels == c].max() for c in range(6)]
    assert widths == sorted(widths)


def test_a_cluster_has_one_grid_that_covers_it():
    low, high = X.min(0), X.max(0)
    labels = clustered(low, high, 8, 50)
    grid = cluster_grid(low, high, labels, 8, Int(8, tensor(), symmetric=False))
    scale, zero = (np.asarray(a, np.float64)[:, 0] for a in (grid.scale, grid.zero))
    for c in np.unique(labels):
        mine = np.asarray(labels) == c
        bottom = min(np.asarray(low)[mine].min(), 0)
        top = max(np.asarray(high)[mine].max(), 0)
        np.testing.assert_allclose(scale[mine], (top - bottom) / 255, rtol=1e-6)
        np.testing.assert_array_equal(zero[mine], np.round(-bottom / scale[mine][0]))


def test_clusters_are_contiguous_in_the_order_of_the_codes():
    q, report = quantized(RPTQ(INT8, clusters=8))
    acts = q["w"].acts[0]
    assert isinstance(acts.t_in, Permutation)
    index = np.asarray(acts.t_in.index)
    np.testing.assert_array_equal(np.sort(index), np.arange(K))
    scales = np.asarray(acts.scale)[:, 0]
    assert acts.scale.shape == acts.zero.shape == (K, 1)
    changes = (np.diff(scales) != 0).sum()
    assert changes == len(np.unique(scales)) - 1 <= 7
    assert report.sites[0].notes["clusters"] == 8
    # Every feature is inside its cluster's grid.
    ends = np.asarray(X)[:, index]
    reach = (255 - np.asarray(acts.zero, np.float64)[:, 0]) * scales
    assert (ends.max(0) <= reach + scales).all()


def test_one_cluster_is_one_static_range_for_all():
    activation = Activation(Int(8, tensor(), symmetric=False), dynamic=False)
    plain = RTN(weights=Int(8), activations=activation)
    ours = apply(linear)(quantized(RPTQ(INT8, clusters=1))[0], X)
    theirs = apply(linear)(quantized(plain)[0], X)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("bits", "gain"), [(8, 0.35), (4, 0.5)])
def test_outlier_features_no_longer_cost_the_others(bits, gain):
    activation = Activation(Int(bits, tensor(), symmetric=False), dynamic=False)
    tensorwise = error(quantized(RTN(weights=Int(8), activations=activation))[0])
    ours = error(quantized(RPTQ(INT8, bits))[0])
    assert ours < gain * tensorwise


def test_more_clusters_lose_less():
    errors = [error(quantized(RPTQ(INT8, 4, c))[0]) for c in (1, 8, K)]
    assert errors[2] < errors[1] < errors[0]


@pytest.mark.parametrize("order", ["static", "dynamic"])
def test_gptq_solves_the_reordered_weights(order):
    then = GPTQ(weights=Int(4, group(32)), act_order=order)
    q, report = quantized(RPTQ(then))
    rounded = error(quantized(RPTQ(RTN(weights=Int(4, group(32)))))[0])
    assert error(q) < 0.95 * rounded
    assert report.sites[0].notes["clusters"] > 1


def test_the_weights_are_those_that_then_makes():
    q, _ = quantized(RPTQ(INT8))
    alone = INT8.solve(W)[0].decode(jnp.float32)
    np.testing.assert_array_equal(q["w"].dequantize(), alone)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_sites_of_one_input_share_the_second_scale_of_nvfp4(rounding):
    """That of the largest weight of both."""
    params = {"a": W, "b": 3 * W[:, ::-1]}
    method = RPTQ(RTN("NVFP4A16", rounding=rounding), clusters=4)
    f = lambda p, x: (x @ p["a"], x @ p["b"])
    key = jax.random.key(0)
    q, _ = quantize_with_report(f, params, method, [(X,)], key=key, progress=False)
    scales = [q[n].parts[0].global_scale.item() for n in "ab"]
    want = NVFP4().fit(jnp.concatenate(list(params.values()), axis=1)).global_scale
    assert scales == [want.item()] * 2


def test_features_fewer_than_clusters_have_one_each():
    x, w = X[:, :5], W[:5]
    q, _ = quantized(RPTQ(INT8, clusters=32), w, x)
    low, high = np.minimum(x.min(0), 0), np.maximum(x.max(0), 0)
    index = np.asarray(q["w"].acts[0].t_in.index)
    scale = (np.asarray(high, np.float64) - low)[index] / 255
    np.testing.assert_allclose(q["w"].acts[0].scale[:, 0], scale, rtol=1e-6)


def test_statistics_follow_their_features():
    index = jnp.asarray(RNG.permutation(4))
    square = jnp.arange(16.0).reshape(4, 4)
    found = reordered({"h": square, "r": Interval(square[0], square[1])}, index)
    order = np.asarray(index)
    np.testing.assert_array_equal(found["h"], np.asarray(square)[np.ix_(order, order)])
    np.testing.assert_array_equal(found["r"].high, np.asarray(square)[1][order])
    with pytest.raises(ValueError, match="not known how features are ordered"):
        reordered(jnp.ones((3, 2)), index)


class Scaled:
    """A method whose transform is no permutation."""

    targets, ignore, activation, random = None, (), None, False
    format, statistics, full_precision, shared = Int(8), {}, False, False

    def solve_site(self, w, stats, key=None):
        return Solution(INT8.solve(w), Diagonal(jnp.ones(w.shape[0])))


def test_is_what_it_wraps_and_refuses_what_it_cannot():
    then = GPTQ(weights=Int(4), targets="*mlp*", ignore="*down*")
    method = RPTQ(then)
    assert isinstance(method, Calibrated)
    for field in ("targets", "ignore", "format", "random", "shared"):
        assert getattr(method, field) == getattr(then, field)
    assert set(method.statistics) == {"hessian", "range"}
    assert RPTQ(RTN(weights=Int(4, channel()))).activation.dynamic is False
    stats = {"range": Interval(X.min(0), X.max(0))}
    with pytest.raises(TypeError, match=r"RPTQ\.then transforms its input by Diagonal"):
        RPTQ(Scaled()).solve_site(W, stats)


BAD = [
    ({"then": "W4A16"}, TypeError, r"RPTQ\.then must be a method"),
    ({"then": RTN("W8A8")}, ValueError, "codes activations itself"),
    ({"activation_bits": 9}, ValueError, r"RPTQ\.activation_bits"),
    ({"clusters": 0}, ValueError, r"RPTQ\.clusters"),
    ({"rounds": 0}, ValueError, r"RPTQ\.rounds"),
]


@pytest.mark.parametrize(("fields", "kind", "message"), BAD)
def test_bad_fields_are_named(fields, kind, message):
    with pytest.raises(kind, match=message):
        RPTQ(**{"then": INT8, **fields})


@partial(jax.jit, static_argnums=0)
def solved(method, w, stats):
    with jax.numpy_dtype_promotion("strict"):
        return method.solve_site(w, stats)


def test_bfloat16_weights_are_accepted():
    stats = {"range": Interval(X.min(0), X.max(0))}
    found = solved(RPTQ(INT8), W.astype(jnp.bfloat16), stats)
    assert found.scale.dtype == jnp.float32 and found.zero.dtype == jnp.uint8
