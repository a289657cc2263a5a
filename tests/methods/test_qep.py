"""QEP: the correction is the published one, and helps whatever follows it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.core.formats import NVFP4, Int, group
from qjax.methods import RTN, LoftQ
from qjax.methods.base import Calibrated
from qjax.methods.gptaq import GPTAQ
from qjax.methods.gptq import GPTQ
from qjax.methods.qep import QEP, corrected

K, N, M = 96, 32, 400
INT4 = Int(4, group(32))
# Small matrices: compiling takes far longer than running.
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def streams(seed=0):
    """A site's full-precision input, and what it has become."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(K, K)) / np.sqrt(K) + 0.3 * np.eye(K)
    full = (rng.normal(size=(M, K)) @ mix) * np.exp(0.5 * rng.normal(size=K))
    return full, full + 0.15 * (rng.normal(size=(M, K)) @ mix - 0.3 * full)


def statistics(full, x):
    found = {"hessian": x.T @ x / M, "cross": (full - x).T @ x / M}
    return {name: value.astype(np.float32) for name, value in found.items()}


W = (np.random.default_rng(1).normal(size=(K, N)) * 0.05).astype(np.float32)


@partial(jit, static_argnums=0)
def solve(method, w, stats):
    with jax.numpy_dtype_promotion("strict"):
        found = method.solve_site(w, stats)
        return found.parts[0].decode(jnp.float32), found.notes


@partial(jit, static_argnums=(3, 4))
def correct(w, hessian, cross, strength, damping):
    with jax.numpy_dtype_promotion("strict"):
        return corrected(w, hessian, cross, strength, damping)


def loss(q, full, x):
    return np.square(full @ W - x @ np.asarray(q)).sum()


@pytest.mark.parametrize(("strength", "damping"), [(0.5, 1.0), (1.0, 0.01)])
def test_correction_is_the_ridge_regression_on_the_drift(strength, damping):
    full, x = streams()
    stats = statistics(full, x)
    found, _ = correct(W, stats["hessian"], stats["cross"], strength, damping)
    ridge = np.sqrt(damping * np.square(x).sum() / K) * np.eye(K)
    missing = np.concatenate(((full - x) @ W, np.zeros((K, N))))
    step = np.linalg.lstsq(np.concatenate((x, ridge)), missing, rcond=None)[0]
    np.testing.assert_allclose(found, W + strength * step, atol=2e-6)


@pytest.mark.parametrize("then", [RTN(weights=INT4), GPTQ(weights=INT4)])
def test_comes_nearer_to_the_full_precision_output(then):
    for seed in range(3):
        full, x = streams(seed)
        stats = statistics(full, x)
        ours, notes = solve(QEP(then), W, stats)
        if isinstance(then, GPTQ):
            plain = solve(then, W, stats)[0]
        else:
            plain = then.solve(jnp.asarray(W))[0].decode()
        assert notes["corrected"]
        assert loss(ours, full, x) < 0.97 * loss(plain, full, x)


@pytest.mark.parametrize("broken", ["hessian", "cross"])
def test_statistics_that_are_not_finite_correct_nothing_and_are_noted(broken):
    stats = statistics(*streams())
    stats[broken][2, 3] = np.inf
    found, notes = correct(W, stats["hessian"], stats["cross"], 0.5, 1.0)
    assert not notes["corrected"]
    np.testing.assert_array_equal(found, W)


def test_keeps_the_dtype_of_the_weights():
    stats = statistics(*streams())
    w = jnp.asarray(W, jnp.bfloat16)
    found, _ = correct(w, stats["hessian"], stats["cross"], 0.5, 1.0)
    assert found.dtype == jnp.bfloat16


def test_is_what_it_wraps():
    then = GPTQ(weights=INT4, targets="*attn*", ignore="*q_proj*")
    method = QEP(then)
    assert isinstance(method, Calibrated) and method.full_precision
    for field in ("targets", "ignore", "format", "activation", "random", "shared"):
        assert getattr(method, field) == getattr(then, field)
    assert set(method.statistics) == {"hessian", "cross"}
    assert QEP(RTN()).shared
    assert QEP(RTN(weights=NVFP4())).shared
    assert not QEP(LoftQ()).shared


def test_what_it_cannot_wrap_is_refused():
    with pytest.raises(ValueError, match=r"QEP\.then .* itself"):
        QEP(GPTAQ())
    with pytest.raises(TypeError, match=r"QEP\.then must be a method"):
        QEP("W4A16")


@pytest.mark.parametrize(("field", "value"), [("strength", 0), ("damping", -1)])
def test_bad_numbers_are_refused(field, value):
    with pytest.raises(ValueError, match=rf"QEP\.{field}"):
        QEP(RTN(), **{field: value})
