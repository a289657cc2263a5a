"""The two streams of a mixture of experts: row `i` is the same token in both."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.quantize import quantize_with_report

D, E, H, T = 16, 8, 32, 128
INT3 = qjax.Int(3, qjax.group(16))


def normal(rng, *shape):
    return jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[-2]), jnp.float32)


def chosen(p, x):
    """The scores of the two experts of each token, and who they are."""
    return jax.lax.top_k(jax.nn.softmax(x @ p["router"], -1), 2)


def routed(p, x, scores, experts):
    order = jnp.argsort(experts.reshape(-1))
    owner = order // 2
    sizes = jnp.bincount(experts.reshape(-1), length=E).astype(jnp.int32)
    # The score goes in with the token, so that it must be that of the row's expert.
    rows = x[owner] * (1 + scores.reshape(-1)[order][:, None])
    inner = jax.nn.silu(jax.lax.ragged_dot(rows, p["up"], sizes))
    out = jax.lax.ragged_dot(inner, p["down"], sizes)
    return jnp.zeros_like(x).at[owner].add(out), rows, inner


def mixture(p, x):
    return routed(p, x, *chosen(p, x))[0]


def first(params, x):
    return mixture(params, jnp.tanh(x @ params["a"]))


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)
    shapes = {"a": (D, D), "router": (D, E), "up": (E, D, H), "down": (E, H, D)}
    params = {name: normal(rng, *shape) for name, shape in shapes.items()}
    batches = [(normal(rng, T, D) * np.sqrt(T),) for _ in range(2)]
    return {**params, "router": 4 * params["router"]}, batches


def noisy(params):
    return params["a"] + 0.2 * normal(np.random.default_rng(1), D, D)


def test_rows_are_those_of_the_quantized_routing(kit, case):
    """The full-precision rows, made by hand from the quantized stream's choices."""
    params, ((x,), _) = case
    given = noisy(params)
    stream = kit.open_stream(first, params, [(x,)], full=True, paired=True)
    found = {}
    for point in stream:
        (name,) = (stream.lanes[0].program.paths[key[0]] for key in point.keys)
        ((_, _, low, full, _),) = stream.inputs(point)
        found[name] = np.asarray(low), np.asarray(full)
        if name == "a":
            stream.solved[point.keys[0]] = given
    low, full = jnp.tanh(x @ given), jnp.tanh(x @ params["a"])
    scores, experts = chosen(params, low)
    assert (experts != chosen(params, full)[1]).any()
    every = jax.nn.softmax(full @ params["router"], -1)
    replayed = jnp.take_along_axis(every, experts, -1)
    _, *low = routed(params, low, scores, experts)
    _, *full = routed(params, full, replayed, experts)
    want = zip(low, full)
    for name, pair in zip(("up", "down"), want, strict=True):
        for got, expected in zip(found[name], pair, strict=True):
            np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-6)


def error(params, quantized, batches):
    f, new = jax.jit(first), qjax.dequantize(quantized)
    return sum(float(jnp.square(f(new, *b) - f(params, *b)).sum()) for b in batches)


def test_making_up_for_the_drift_helps_experts(case):
    params, batches = case
    plain = qjax.GPTQ(weights=INT3, ignore="router")
    recipes = {
        "gptq": plain,
        "gptaq": qjax.GPTAQ(weights=INT3, alpha=1, ignore="router"),
        "qep": qjax.QEP(plain, strength=1, damping=0.01),
    }
    errors = {}
    for name, recipe in recipes.items():
        q, report = quantize_with_report(first, params, recipe, batches, progress=False)
        assert not any(row.fallback for row in report.sites)
        errors[name] = error(params, q, batches)
    assert max(errors["gptaq"], errors["qep"]) < 0.9 * errors["gptq"]


def hidden(params, x):
    """Rows are sorted inside a loop, where the streams are not held together."""
    x = jnp.tanh(x @ params["a"])

    def step(x, _):
        return x[jnp.argsort(x[:, 0])], None

    rows, _ = jax.lax.scan(step, x, length=1)
    sizes = jnp.full(E, x.shape[0] // E, jnp.int32)
    return jax.lax.ragged_dot(rows, params["up"], sizes)


@pytest.mark.parametrize("name", ["GPTAQ", "QEP"])
def test_what_is_not_followed_is_said_and_costs_no_more_than_gptq(name, case):
    params, batches = case
    params = {"a": params["a"], "up": params["up"]}
    plain = qjax.GPTQ(weights=INT3)
    recipe = qjax.GPTAQ(weights=INT3) if name == "GPTAQ" else qjax.QEP(plain)
    q, report = quantize_with_report(hidden, params, recipe, batches, progress=False)
    rows = {row.name: row.fallback for row in report.sites}
    assert "inside scan: the drift of the input was taken as zero" in rows["up"]
    assert not rows["a"]
    same = qjax.quantize(hidden, params, plain, batches, progress=False)
    got, want = (np.asarray(qjax.dequantize(each)["up"]) for each in (q, same))
    assert np.mean(got == want) > 0.995


def test_sorted_floats(kit, case):
    """The largest of one stream are not the largest of the other."""

    def f(params, x):
        x = jnp.tanh(x @ params["a"])
        return jnp.sort(x, axis=0) @ params["b"]

    params, ((x,), _) = case
    params, given = {"a": params["a"], "b": params["router"]}, noisy(params)
    stream = kit.open_stream(f, params, [(x,)], full=True, paired=True)
    seen = []
    for point in stream:
        seen = next(stream.inputs(point))
        stream.solved[point.keys[0]] = given
    _, _, low, full, _ = seen
    order = np.argsort(np.tanh(x @ given), axis=0)
    rows = np.take_along_axis(np.tanh(x @ params["a"]), order, 0)
    np.testing.assert_allclose(full, rows, rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(low, np.sort(np.tanh(x @ given), axis=0), rtol=2e-5)
