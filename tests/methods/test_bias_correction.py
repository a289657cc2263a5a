"""Bias correction: outputs are right on average; what cannot be corrected says so."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from qjax.core.formats import Float, Int, channel, group, tensor, token
from qjax.core.qtensor import Activation, SiteActs
from qjax.core.transforms import Permutation
from qjax.methods import RTN
from qjax.methods.base import Solution
from qjax.methods.bias_correction import BiasCorrection, CodedMean, correction
from qjax.ops.activations import coded_values
from qjax.quantize import quantize_with_report
from qjax.trace.apply import apply

K, N, M = 48, 24, 200
RNG = np.random.default_rng(0)
W = jnp.asarray(RNG.normal(size=(K, N)), jnp.float32)
X = jnp.asarray(RNG.normal(size=(M, K)) + RNG.normal(size=K), jnp.float32)
INT3, INT2 = Int(3, group(16)), Int(2, channel())
TOKENS4 = Activation(Int(4, token(), symmetric=False))


def linear(params, x):
    return x @ params["w"]


def corrected(method, kind="analytic", f=linear, params=None, x=X):
    params = {"w": W} if params is None else params
    recipe = (method, BiasCorrection(kind))
    return quantize_with_report(f, params, recipe, [(x,)], progress=False)


def means(q, f=linear, x=X):
    """The mean output, in float64."""
    y = np.asarray(jax.jit(apply(f))(q, x), np.float64).reshape(-1, q["w"].layout.N)
    return y.mean(0)


def test_correction_is_the_difference_of_mean_outputs():
    q = W + 0.1 * jnp.sign(W)
    coded = jnp.round(4 * X) / 4
    found = correction(W, q, X.mean(0), coded.mean(0))
    x, c, w, v = (np.asarray(a, np.float64) for a in (X, coded, W, q))
    np.testing.assert_allclose(found, (x @ w - c @ v).mean(0), atol=2e-6)


@pytest.mark.parametrize(
    ("kind", "weights"), [("analytic", INT3), ("analytic", INT2), ("empirical", INT2)]
)
def test_mean_output_is_that_of_the_float_layer(kind, weights):
    exact = np.asarray(X, np.float64) @ np.asarray(W, np.float64)
    q, report = corrected(RTN(weights=weights), kind)
    size = np.abs(exact.mean(0)).max()
    np.testing.assert_allclose(means(q), exact.mean(0), atol=2e-6 * size)
    assert report.sites[0].notes["bias"] > 0
    plain = quantize_with_report(
        linear, {"w": W}, RTN(weights=weights), [(X,)], progress=False
    )[0]
    before, after = (
        np.square(np.asarray(apply(linear)(tree, X)) - exact).sum()
        for tree in (plain, q)
    )
    assert after < 0.8 * before


def test_empirical_makes_up_for_coded_activations_too():
    method = RTN(weights=INT2, activations=TOKENS4)
    exact = np.asarray(X @ W, np.float64).mean(0)
    errors = {
        kind: np.abs(means(corrected(method, kind)[0]) - exact).max()
        for kind in ("analytic", "empirical")
    }
    assert errors["empirical"] < 1e-5
    assert errors["analytic"] > 100 * errors["empirical"]


@pytest.mark.parametrize(
    "activation",
    [
        TOKENS4,
        Activation(Int(8, tensor())),
        Activation(Float("e4m3", group(16))),
        Activation(Int(8, token()), outliers=3.0),
    ],
    ids=lambda a: f"{a.format.name} {a.outliers}",
)
def test_coded_mean_is_the_mean_of_what_runs(activation):
    with jax.numpy_dtype_promotion("strict"):
        statistic = CodedMean(activation)
        state = statistic.init(K)
        for part in (X[:150], X[150:]):
            weight = jnp.ones(part.shape[0])
            state = statistic.update(state, part, weight)
        found = statistic.finalize(state)
    if activation.outliers is None:
        acts = SiteActs(activation=activation)
        parts = [coded_values(p, acts) for p in (X[:150], X[150:])]
    else:
        parts = [outliers_kept(np.asarray(p), 3.0) for p in (X[:150], X[150:])]
    exact = np.concatenate([np.asarray(p, np.float64) for p in parts]).mean(0)
    np.testing.assert_allclose(found, exact, atol=1e-5)


def outliers_kept(x, threshold):
    """int8 per token, features that reach the threshold untouched."""
    keep = (np.abs(x) >= threshold).any(0)
    rest = np.where(keep, 0, x)
    below = np.where(np.abs(x) >= threshold, 0, x)
    scale = np.abs(below).max(1, keepdims=True) / np.float32(127.5)
    return np.where(keep, x, np.clip(np.round(rest / scale), -128, 127) * scale)


def test_tokens_that_do_not_count_do_not_enter():
    statistic = CodedMean(TOKENS4)
    padded = jnp.concatenate([X[:20], jnp.full((5, K), jnp.nan)])
    weight = (jnp.arange(25) < 20).astype(jnp.float32)
    found = statistic.update(statistic.init(K), padded, weight)
    alone = statistic.update(statistic.init(K), X[:20], jnp.ones(20))
    merged = statistic.merge(statistic.init(K), found)
    for a, b in zip(jax.tree.leaves(merged), jax.tree.leaves(alone)):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_transforms_low_rank_and_an_earlier_bias_are_counted():
    index = jnp.asarray(RNG.permutation(K))
    parts = RTN(weights=INT2).solve(W[index])
    left, right = jnp.ones((K, 1)), jnp.ones((1, N))
    given = Solution(parts, Permutation(index), left, right, bias=jnp.ones(N))
    found = BiasCorrection().repair(W, given, {"mean": X.mean(0)})
    order = np.asarray(index)
    q = np.zeros((K, N))
    q[order] = np.asarray(parts[0].decode(jnp.float32)) + 1
    exact = np.asarray(X, np.float64).mean(0) @ (np.asarray(W, np.float64) - q)
    np.testing.assert_allclose(found.bias, 1 + exact, rtol=1e-5, atol=1e-5)


def test_static_ranges_say_that_the_mean_is_of_the_uncoded_input():
    method = RTN(weights=INT3, activations=Activation(Int(8, tensor()), dynamic=False))
    _, report = corrected(method, "empirical")
    assert report.sites[0].notes["coded_mean"] == 0
    _, report = corrected(RTN(weights=INT3, activations=TOKENS4), "empirical")
    assert report.sites[0].notes["coded_mean"] == 1
    with pytest.raises(ValueError, match=r"CodedMean\.activation .* static"):
        CodedMean(Activation(Int(8), dynamic=False))


def test_layers_of_a_scan_each_have_their_bias():
    stack = jnp.asarray(RNG.normal(size=(3, K, K)) / 7, jnp.float32)

    def scanned(params, x):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), x @ w), x, params["w"])[1]

    q, _ = corrected(RTN(weights=INT2), f=scanned, params={"w": stack})
    assert q["w"].bias.shape == (3, K)
    y = np.asarray(scanned({"w": stack}, X)[0], np.float64).mean(0)
    ours = np.asarray(apply(scanned)(q, X)[0], np.float64).mean(0)
    np.testing.assert_allclose(ours, y, atol=1e-5)


def test_a_convolution_takes_it():
    kernel = jnp.asarray(RNG.normal(size=(3, 3, 4, 8)), jnp.float32)
    image = jnp.asarray(RNG.normal(size=(2, 9, 9, 4)) + 1, jnp.float32)
    conv = partial(
        lax.conv_general_dilated,
        window_strides=(1, 1),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )

    def f(params, x):
        return conv(x, params["w"])

    q, _ = corrected(RTN(weights=INT2), f=f, params={"w": kernel}, x=image)
    exact = np.asarray(f({"w": kernel}, image), np.float64).reshape(-1, 8).mean(0)
    np.testing.assert_allclose(means(q, f, image), exact, atol=1e-5)


def test_experts_are_left_alone_and_the_report_says_so():
    experts = jnp.asarray(RNG.normal(size=(2, K, N)), jnp.float32)
    sizes = jnp.asarray([120, 80], jnp.int32)

    def f(params, x):
        return lax.ragged_dot(x, params["w"], sizes)

    q, report = corrected(RTN(weights=INT3), f=f, params={"w": experts})
    assert q["w"].bias is None
    assert report.sites[0].notes["bias_not_applied"] == 1


def test_bad_fields_are_named():
    three: Any = 3
    with pytest.raises(ValueError, match=r"BiasCorrection\.kind"):
        BiasCorrection("both")
    with pytest.raises(TypeError, match="targets"):
        BiasCorrection(targets=three)
