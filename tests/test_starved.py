"""Experts and branches that see few tokens or none: ranges, scales, refusals."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import qjax
from qjax.quantize import quantize_with_report

RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def run(f, params, batches, recipe):
    return quantize_with_report(f, params, recipe, batches, progress=False)


def routed(p, x, sizes):
    return jax.lax.ragged_dot(x, p["w"], sizes)


STATIC = {
    "int8": (qjax.Int(8), qjax.Int(8, qjax.tensor())),
    "e4m3": (qjax.Float("e4m3"), qjax.Float("e4m3", qjax.tensor())),
}


@pytest.mark.parametrize("kind", STATIC)
def test_static_ranges_of_experts(kind):
    """Each row is coded on its expert's range; one that saw nothing has that of all."""
    weights, inputs = STATIC[kind]
    activation = qjax.Activation(inputs, dynamic=False)
    params, x = {"w": normal(3, 16, 6)}, normal(12, 16)
    x = x * jnp.repeat(jnp.array([1.0, 9.0]), jnp.array([7, 5]))[:, None]
    method = qjax.RTN(weights=weights, activations=activation, targets="w")
    q, report = run(routed, params, [(x, jnp.array([7, 0, 5]))], method)
    assert "its range as that of all experts" in report.sites[0].fallback
    tops = [np.abs(rows).max() for rows in (x[:7], x, x[7:])]
    y = np.asarray(qjax.apply(routed)(q, x, jnp.array([4, 4, 4])))
    for e, top in enumerate(tops):
        rows = np.asarray(x[4 * e : 4 * e + 4])
        if kind == "int8":
            scale = np.float32(top) / np.float32(127.5)
            seen = np.clip(np.round(rows / scale), -128, 127) * scale
        else:
            scale = np.float32(top) / np.float32(448)
            codes = np.clip(rows / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn)
            seen = codes.astype(np.float32) * scale
        want = seen @ np.asarray(qjax.dequantize(q)["w"][e])
        np.testing.assert_allclose(y[4 * e : 4 * e + 4], want, rtol=1e-4, atol=1e-3)


def test_two_levels_of_static_scales_at_experts():
    params, x = {"w": normal(3, 32, 6)}, normal(12, 32)
    sizes = jnp.array([7, 0, 5])
    q, _ = run(routed, params, [(x, sizes)], qjax.RTN("NVFP4", targets="w"))
    exact = routed(params, x, sizes)
    near = qjax.apply(routed)(q, x, sizes)
    assert jnp.linalg.norm(near - exact) < 0.2 * jnp.linalg.norm(exact)


def test_a_static_range_needs_samples():
    def f(p, x):
        return jax.lax.cond(x.sum() < 1e9, lambda: x @ p["a"], lambda: x @ p["b"])

    params = {n: normal(16, 16) for n in "ab"}
    with pytest.raises(ValueError, match=r"^no sample reached b, so the range of its"):
        run(f, params, [(normal(5, 16),)], qjax.RTN("FP8"))
    run(f, params, [(normal(5, 16),)], qjax.RTN("FP8", targets="a"))


def test_outlier_features_of_experts_are_refused():
    batch = (normal(12, 16), jnp.array([7, 0, 5]))
    with pytest.raises(ValueError, match=r"^w is read by a ragged_dot, and only dot"):
        run(routed, {"w": normal(3, 16, 6)}, [batch], qjax.LLMInt8(targets="w"))


def test_scales_of_experts_are_left_and_reported():
    def f(p, x, sizes):
        dense = jnp.einsum("tk,ekn->etn", jnp.sin(x), p["dense"])
        return routed(p, x, sizes), jnp.einsum("etk,ekn->etn", dense, p["next"])

    shapes = {"w": (3, 16, 6), "dense": (3, 16, 8), "next": (3, 8, 4)}
    params = {name: normal(*shape) for name, shape in shapes.items()}
    batch = (normal(12, 16), jnp.array([7, 0, 5]))
    for step in (qjax.SmoothQuant(online=True), qjax.AWQ(n_grid=2, online=True)):
        method = (step, qjax.RTN(weights=qjax.Int(4)))
        _, report = run(f, params, [batch], method)
        remarks = {row.names[0]: row.remark for row in report.transforms}
        assert remarks["w"] == remarks["next"] == "its input is that of several experts"
