"""Cross-layer equalization: the same function, equal ranges; and what may be folded."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.core.coded import encode
from qjax.core.formats import Int, tensor
from qjax.methods import RTN
from qjax.methods.base import Solution
from qjax.methods.cross_layer import (
    CrossLayerEqualization,
    equalizing_scale,
    ranges,
)
from qjax.quantize import quantize_with_report
from qjax.trace.apply import apply

D, H = 24, 40
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(64, D)) + 0.5, jnp.float32)
W8 = RTN(weights=Int(8, tensor()))


class Keep:
    """Stores the weights as they are: a low-rank part of full rank."""

    targets, ignore, random, activation = None, (), False, None
    full_precision = shared = False
    format, statistics = Int(8), {}

    def solve_site(self, w, stats, key=None):
        zero = encode(jnp.zeros_like(w), self.format)
        return Solution((zero,), left=w, right=jnp.eye(w.shape[1], dtype=w.dtype))


def badly_scaled():
    """A ReLU network whose channels differ by orders of magnitude."""
    a, b = (np.exp(1.5 * RNG.normal(size=H)) for _ in range(2))
    params = {
        "up": RNG.normal(size=(D, H)) * a,
        "up_bias": RNG.normal(size=H) * a,
        "mid": RNG.normal(size=(H, H)) / a[:, None] * b,
        "mid_bias": RNG.normal(size=H) * b,
        "down": RNG.normal(size=(H, D)) / b[:, None],
    }
    return {name: jnp.asarray(w, jnp.float32) for name, w in params.items()}


def network(params, x):
    h = jax.nn.relu(x @ params["up"] + params["up_bias"])
    h = jnp.maximum(h @ params["mid"] + params["mid_bias"], 0)
    return h @ params["down"]


PARAMS = badly_scaled()


def run(f, params, *recipe, x=X):
    return quantize_with_report(f, params, recipe, [(x,)], progress=False)


def error(f, params, q, x=X):
    exact = np.asarray(jax.jit(f)(params, x), np.float64)
    found = jax.jit(apply(f))(q, x)
    return np.linalg.norm(found - exact) / np.linalg.norm(exact)


def test_scale_equalizes_both_ranges():
    r1, r2 = np.exp(RNG.normal(size=(2, H))).astype(np.float32)
    s = np.asarray(equalizing_scale(jnp.asarray(r1), jnp.asarray(r2)))
    np.testing.assert_allclose(s, np.sqrt(r1 * r2) / r2, rtol=1e-6)
    np.testing.assert_allclose(r1 / s, r2 * s, rtol=1e-5)
    zero = equalizing_scale(jnp.asarray([0.0, 1.0]), jnp.asarray([1.0, 0.0]))
    np.testing.assert_array_equal(zero, 1)


def test_ranges_are_over_every_reader():
    readers = [PARAMS["mid"], 10 * PARAMS["mid"][:, :3]]
    before, after = ranges(PARAMS["up"], readers)
    np.testing.assert_array_equal(before, np.abs(PARAMS["up"]).max(0))
    both = np.concatenate([np.asarray(w) for w in readers], 1)
    np.testing.assert_array_equal(after, np.abs(both).max(1))


def test_the_function_stays():
    q, report = run(network, PARAMS, CrossLayerEqualization(), Keep())
    assert error(network, PARAMS, q) < 1e-6
    into = {row.names[0]: row.into for row in report.transforms}
    assert into == {"up": "", "mid": "up_bias, up", "down": "mid_bias, mid"}
    assert not np.allclose(q["up_bias"], PARAMS["up_bias"])


def test_ranges_are_equal_afterwards():
    """The last pair is equal; the one before it was, until the last moved it."""
    q, _ = run(network, PARAMS, CrossLayerEqualization(), Keep())
    mid, down = (np.asarray(q[name].dequantize()) for name in ("mid", "down"))
    np.testing.assert_allclose(np.abs(mid).max(0), np.abs(down).max(1), rtol=1e-5)


def test_one_scale_for_the_whole_matrix_is_enough_afterwards():
    plain = error(network, PARAMS, run(network, PARAMS, W8)[0])
    ours = error(network, PARAMS, run(network, PARAMS, CrossLayerEqualization(), W8)[0])
    assert plain > 0.2
    assert ours < 0.1 * plain


def test_inputs_from_a_norm_are_left_and_reported():
    def f(params, x):
        return (x * params["gain"]) @ params["w"]

    params = {"gain": jnp.ones(D), "w": jnp.ones((D, H))}
    _, report = run(f, params, CrossLayerEqualization(), W8)
    assert report.transforms[0].into == ""
    assert "by a norm" in report.transforms[0].remark


def square(params, x):
    h = jax.nn.relu(x @ params["up"])
    return (h * h) @ params["mid"]


def capped(params, x):
    return jax.nn.relu6(x @ params["up"]) @ params["mid"]


def shifted(params, x):
    return jnp.maximum(x @ params["up"], 1) @ params["mid"]


def turned(params, x):
    bias = params["up_bias"].reshape(5, 8).T.reshape(-1)
    return (x @ params["up"] + bias) @ params["mid"]


def shared(params, x):
    return (x @ params["up"]) @ params["mid"] + params["up"].sum()


def returned(params, x):
    return (x @ params["up"]) @ params["mid"], params["up"]


REFUSED = {
    square: "multiplying a value with itself",
    capped: "made by",
    shifted: "made by max",
    turned: "do not stand for channels",
    shared: "used elsewhere",
    returned: "used elsewhere",
}


@pytest.mark.filterwarnings("ignore:up is dequantized")
@pytest.mark.parametrize("f", REFUSED, ids=lambda f: f.__name__)
def test_what_a_scale_does_not_pass_is_never_folded(f):
    params = {name: PARAMS[name] for name in ("up", "up_bias", "mid")}
    q, report = run(f, params, CrossLayerEqualization(), Keep())
    remark = {row.names[0]: row.remark for row in report.transforms}["mid"]
    assert REFUSED[f] in remark
    np.testing.assert_array_equal(q["up_bias"], params["up_bias"])
    first = jax.tree.leaves(f(params, X))[0]
    np.testing.assert_allclose(jax.tree.leaves(apply(f)(q, X))[0], first, rtol=1e-3)


def test_bad_fields_are_named():
    three: Any = 3
    with pytest.raises(TypeError, match="targets"):
        CrossLayerEqualization(targets=three)
