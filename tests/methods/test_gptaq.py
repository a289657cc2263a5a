"""GPTAQ: nearer to the full-precision output than GPTQ when the input has drifted."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.core.formats import Int, group
from qjax.core.statistics import Cross
from qjax.methods.base import Calibrated
from qjax.methods.gptaq import GPTAQ
from qjax.methods.gptq import GPTQ

K, N, M = 128, 32, 512
INT3 = Int(3, group(32))
# Small matrices: compiling takes far longer than running.
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def streams(seed=0, noise=0.15):
    """A site's full-precision input, and what it has become."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(K, K)) / np.sqrt(K) + 0.3 * np.eye(K)
    full = (rng.normal(size=(M, K)) @ mix) * np.exp(0.5 * rng.normal(size=K))
    drift = rng.normal(size=(M, K)) @ mix - 0.3 * full
    return full, full + noise * drift


def statistics(full, x):
    found = {"hessian": x.T @ x / M, "cross": (full - x).T @ x / M}
    return {name: value.astype(np.float32) for name, value in found.items()}


def weights(seed=1):
    return (np.random.default_rng(seed).normal(size=(K, N)) * 0.05).astype(np.float32)


@partial(jit, static_argnums=0)
def solve(method, w, stats):
    with jax.numpy_dtype_promotion("strict"):
        found = method.solve_site(w, stats)
        q = found.parts[0].decode(jnp.float32)
        q = q if found.t_in is None else found.t_in.left(q)
        return found.notes, found.parts[0].unpack(), q


def loss(w, q, full, x):
    return np.square(full @ w - x @ np.asarray(q)).sum()


@pytest.mark.parametrize(("alpha", "share"), [(0.25, 0.99), (1.0, 0.97)])
def test_comes_nearer_to_the_full_precision_output(alpha, share):
    w = weights()
    for seed in range(4):
        full, x = streams(seed)
        stats = statistics(full, x)
        _, _, ours = solve(GPTAQ(alpha=alpha, weights=INT3), w, stats)
        _, _, plain = solve(GPTQ(weights=INT3), w, stats)
        assert loss(w, ours, full, x) < share * loss(w, plain, full, x)


def published(w, stats, bits, size, alpha):
    """The equations feature by feature in float64, static groups."""
    h, cross = (stats[name].astype(np.float64) for name in ("hessian", "cross"))
    order = np.argsort(-np.diag(h), kind="stable")
    groups = w.reshape(K // size, size, N)
    scale = (np.abs(groups).max(1) / ((2**bits - 1) / 2)).astype(np.float32)
    h = h + 0.01 * np.diag(h).mean() * np.eye(K)
    upper = np.linalg.cholesky(np.linalg.inv(h[order][:, order])).T
    p = alpha * np.triu(cross[order][:, order] @ upper.T, 1) @ upper
    first, now = w[order].astype(np.float64), w[order].astype(np.float64)
    codes = np.zeros((K, N), int)
    for j in range(K):
        step = scale[order[j] // size].astype(np.float64)
        q = np.clip(np.round(now[j] / step), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        codes[order[j]] = q + 2 ** (bits - 1)
        passed = (now[j] - q * step) / upper[j, j]
        later = slice(j + 1, K)
        now[later] += np.outer(p[j, later], first[j]) - np.outer(
            upper[j, later], passed
        )
    return codes


def test_codes_are_those_of_the_equations():
    full, x = streams()
    w, stats = weights(), statistics(full, x)
    _, codes, _ = solve(GPTAQ(weights=INT3), w, stats)
    expected = published(w, stats, 3, 32, 0.25)
    assert (np.asarray(codes) == expected).mean() >= 0.999


def test_without_drift_it_is_gptq():
    full, _ = streams()
    stats = statistics(full, full)
    _, ours, _ = solve(GPTAQ(weights=INT3), weights(), stats)
    _, plain, _ = solve(GPTQ(weights=INT3), weights(), stats)
    np.testing.assert_array_equal(ours, plain)


@pytest.mark.parametrize("broken", ["hessian", "cross"])
def test_statistics_that_are_not_finite_move_no_target_and_are_noted(broken):
    stats = statistics(*streams())
    stats[broken][3, 5] = np.nan
    notes, _, q = solve(GPTAQ(weights=INT3), weights(), stats)
    assert not notes["drift"] and np.isfinite(q).all()
    assert notes["diagonal"] == (broken == "hessian")
    np.testing.assert_array_equal(q, solve(GPTQ(weights=INT3), weights(), stats)[2])


@pytest.mark.parametrize("order", ["dynamic", "group", "off"])
def test_every_order_gains(order):
    full, x = streams()
    w, stats = weights(), statistics(full, x)
    _, _, ours = solve(GPTAQ(alpha=1.0, weights=INT3, act_order=order), w, stats)
    _, _, plain = solve(GPTQ(weights=INT3, act_order=order), w, stats)
    assert loss(w, ours, full, x) < 0.97 * loss(w, plain, full, x)


def test_asks_for_the_full_precision_stream():
    method = GPTAQ(weights=INT3)
    assert isinstance(method, Calibrated)
    assert method.full_precision and isinstance(method.statistics["cross"], Cross)


@pytest.mark.parametrize("alpha", [0, 1.5, -0.25])
def test_bad_alpha_is_refused(alpha):
    with pytest.raises(ValueError, match=r"GPTAQ\.alpha"):
        GPTAQ(alpha=alpha)
