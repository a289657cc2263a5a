"""GPTQ against the paper in float64, and what must hold when data is poor."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.core.formats import (
    MSE,
    MX,
    NVFP4,
    Codebook,
    Float,
    Int,
    block,
    channel,
    group,
    tensor,
)
from qjax.methods import RTN
from qjax.methods.base import Calibrated
from qjax.methods.gptq import GPTQ

K, N = 192, 32
BLOCK = 64  # every whole shape is one program to compile
INT4 = Int(4, group(64))


def inputs(M=600, K=K, seed=0):
    """Correlated features of very different size."""
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(M, K)) @ (rng.normal(size=(K, K)) / np.sqrt(K))
    return (mixed + 0.3 * rng.normal(size=(M, K))) * np.exp(rng.normal(size=K))


def hessian(M=600, K=K, seed=0):
    x = inputs(M, K, seed)
    return (x.T @ x / M).astype(np.float32)


def weights(K=K, N=N, seed=1):
    """Weights whose largest in a group is positive.

    The largest weight of a symmetric group lies half way between two codes, so that its
    rounding is one of the last bit; a positive one is clipped to the same code.
    """
    w = np.random.default_rng(seed).normal(size=(K, N)) * 0.02
    return np.where(w < 0, 0.5 * w, w).astype(np.float32)


# Small matrices: compiling takes far longer than running.
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def solution(method, w, h):
    """The solution, its codes, and its weights in the order of the input."""
    with jax.numpy_dtype_promotion("strict"):
        found = method.solve_site(w, {"hessian": h})
        q = found.parts[0].decode(jnp.float32)
        q = q if found.t_in is None else found.t_in.left(q)
        return found, found.parts[0].unpack(), q


solve = jit(solution, static_argnums=0)


@partial(jit, static_argnums=0)
def nearest(format, w):
    return RTN(weights=format).solve(w)[0].decode(jnp.float32)


def plain(w, format=INT4):
    return np.asarray(nearest(format, w))


def error(w, q, h):
    d = w.astype(np.float64) - np.asarray(q)
    return np.sum(d * (h.astype(np.float64) @ d))


def range_grid(w, bits, symmetric):
    """Scale and zero point of each column of a group, scales rounded to float32."""
    low, high = np.minimum(w.min(0), 0), np.maximum(w.max(0), 0)
    if symmetric:
        scale = np.maximum(-low, high) / ((2**bits - 1) / 2)
        return scale.astype(np.float32).astype(float), np.full(
            w.shape[1], 2 ** (bits - 1)
        )
    scale = ((high - low) / (2**bits - 1)).astype(np.float32).astype(float)
    return scale, np.clip(np.round(-low / scale), 0, 2**bits - 1)


def published(w, h, bits, size, symmetric, order):
    """Algorithm 1 of the paper in float64, feature by feature: codes and values.

    Returned in the order of the input, or of the sweep for "dynamic".
    """
    w, h = w.astype(np.float64), h.astype(np.float64)
    K = len(w)
    size = size or K
    diagonal = np.diag(h)
    groups = np.arange(K) // size
    perm = np.argsort(-diagonal, kind="stable")
    if order == "off":
        perm = np.arange(K)
    if order == "group":
        tops = [diagonal[groups == g].max() for g in range(K // size)]
        runs = list(np.argsort(-np.array(tops), kind="stable"))
        runs += [K // size] if K % size else []
        perm = np.concatenate([perm[groups[perm] == g] for g in runs])
    h = h + 0.01 * diagonal.mean() * np.eye(K)
    upper = np.linalg.cholesky(np.linalg.inv(h[perm][:, perm])).T
    ahead = {
        g: range_grid(w[groups == g], bits, symmetric) for g in range(groups[-1] + 1)
    }
    w, codes = w[perm].copy(), np.zeros(w.shape, int)
    values = np.zeros(w.shape)
    scale, zero = ahead[0]
    for j in range(K):
        if order == "static":
            scale, zero = ahead[int(groups[perm[j]])]
        elif j % size == 0:
            scale, zero = range_grid(w[j : j + size], bits, symmetric)
        codes[j] = np.clip(np.round(w[j] / scale + zero), 0, 2**bits - 1)
        values[j] = (codes[j] - zero) * scale
        passed = (w[j] - values[j]) / upper[j, j]
        w[j + 1 :] -= np.outer(upper[j, j + 1 :], passed)
    if order == "dynamic" and size < K:
        return codes, perm
    back = np.argsort(perm)
    return codes[back], None


@pytest.mark.parametrize(
    ("bits", "size", "symmetric", "order", "K"),
    [
        (4, 64, True, "off", K),
        (4, 64, True, "static", K),
        (4, 64, True, "dynamic", K),
        (4, 64, False, "group", 176),
        (3, None, True, "static", K),
        (3, None, False, "off", 176),
    ],
)
def test_codes_are_the_paper_s(bits, size, symmetric, order, K):
    w, h = weights(K), hessian(K=K)
    granularity = channel() if size is None else group(size)
    format = Int(bits, granularity, symmetric=symmetric)
    method = GPTQ(weights=format, act_order=order, block_size=BLOCK)
    found, codes, _ = solve(method, w, h)
    expected, perm = published(w, h, bits, size, symmetric, order)
    assert (np.asarray(codes) == expected).mean() >= 0.999
    assert (found.t_in is None) == (perm is None)
    if perm is not None:
        np.testing.assert_array_equal(found.t_in.index, perm)


def published_levels(w, h, table, size, order):
    """The same for levels that are not evenly spaced, with a scale for each group."""
    w, h = w.astype(np.float64), h.astype(np.float64)
    groups = np.arange(K) // size
    perm = np.argsort(-np.diag(h), kind="stable") if order == "static" else np.arange(K)
    h = h + 0.01 * np.diag(h).mean() * np.eye(K)
    upper = np.linalg.cholesky(np.linalg.inv(h[perm][:, perm])).T
    tops = np.abs(w.reshape(-1, size, w.shape[1])).max(1)  # the levels end at -1 and 1
    w, codes = w[perm].copy(), np.zeros(w.shape, int)
    for j in range(K):
        if order == "off" and j % size == 0:
            tops[j // size] = np.abs(w[j : j + size]).max(0)
        top = tops[groups[perm[j]]]
        codes[j] = np.abs(w[j] / top - table[:, None]).argmin(0)
        passed = (w[j] - table[codes[j]] * top) / upper[j, j]
        w[j + 1 :] -= np.outer(upper[j, j + 1 :], passed)
    return codes[np.argsort(perm)]


@pytest.mark.parametrize("levels", ["nf4", (-1.0, -0.5, -0.2, 0.0, 0.1, 0.3, 0.6, 1.0)])
@pytest.mark.parametrize("order", ["off", "static"])
def test_codes_of_a_codebook_are_the_paper_s(levels, order):
    w, h = weights(), hessian()
    format = Codebook(levels, granularity=group(64))
    method = GPTQ(weights=format, act_order=order, block_size=BLOCK)
    expected = published_levels(w, h, np.asarray(format.table, np.float64), 64, order)
    codes = np.asarray(solve(method, w, h)[1])
    assert (codes == expected).mean() >= 0.999


@pytest.mark.parametrize(
    ("format", "order"),
    [
        (Int(4, block(64, 16)), "off"),
        (Codebook("nf4", granularity=group(64)), "dynamic"),
        (Codebook(None, bits=3, granularity=group(64)), "dynamic"),
        (Float("e4m3"), "static"),
        (MX("fp4"), "off"),
        (NVFP4(), "group"),
    ],
    ids=lambda x: getattr(x, "name", x),
)
def test_every_format_beats_round_to_nearest(format, order):
    w, h = weights(), hessian()
    method = GPTQ(weights=format, act_order=order, block_size=BLOCK)
    _, _, q = solve(method, w, h)
    assert error(w, q, h) < 0.7 * error(w, plain(w, format), h)


def test_order_of_the_features_helps_at_three_bits():
    w, h = weights(), hessian()
    errors = []
    for order in ("off", "static"):
        method = GPTQ(weights=Int(3), act_order=order, block_size=BLOCK)
        errors.append(error(w, solve(method, w, h)[2], h))
    assert errors[1] < errors[0]


METHOD = GPTQ(weights=INT4, block_size=BLOCK)


def test_few_samples_still_help():
    w, h = weights(), hessian(M=20)
    found, _, q = solve(METHOD, w, h)
    assert not found.notes["diagonal"]
    assert error(w, q, h) < error(w, plain(w), h)


def test_no_sample_is_round_to_nearest_and_noted():
    w, h = weights(), np.zeros((K, K), np.float32)
    found, _, q = solve(METHOD, w, h)
    assert found.notes["dead"] == K
    np.testing.assert_array_equal(q, plain(w))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_hessian_that_is_not_finite_is_round_to_nearest_and_noted(value):
    w, h = weights(), hessian()
    h[7, 7] = value
    found, _, q = solve(METHOD, w, h)
    assert found.notes["diagonal"] and found.notes["dead"] == 0
    np.testing.assert_array_equal(q, plain(w))


def test_dead_features_become_zero_and_disturb_nothing():
    w, h = weights(), hessian()
    dead = [0, 70, 191]
    h[dead] = 0
    h[:, dead] = 0
    found, _, q = solve(METHOD, w, h)
    assert found.notes["dead"] == 3
    assert (np.asarray(q)[dead] == 0).all()
    w[dead] = 0
    _, codes, _ = solve(METHOD, w, h)
    h[dead, dead] = np.diag(h).sum() / (K - 3)  # leaves the mean diagonal as it is
    expected, _ = published(w, h, 4, 64, True, "static")
    assert (np.asarray(codes) == expected).mean() >= 0.999


def test_a_little_damping_is_raised_where_it_is_not_enough():
    w, h = weights(), hessian()
    h -= 0.05 * np.diag(h).mean() * np.eye(K, dtype=np.float32)
    found, _, q = solve(METHOD, w, h)
    np.testing.assert_allclose(found.notes["damping"], 0.1, rtol=1e-6)
    assert np.isfinite(q).all()


def test_a_column_does_not_know_its_neighbours():
    w, h = weights(), hessian()
    assert METHOD.shared
    _, together, _ = solve(METHOD, w, h)
    _, alone, _ = solve(METHOD, w[:, 16:32], h)
    np.testing.assert_array_equal(np.asarray(together)[:, 16:32], alone)


@pytest.mark.parametrize(
    "format", [Int(4, tensor()), Int(4, block(64, 32)), Codebook(None, bits=4)]
)
def test_columns_with_a_common_grid_are_not_shared(format):
    assert not GPTQ(weights=format).shared


def test_columns_share_a_second_scale_alone():
    """That of the whole: less of it would give a part of it other scales."""
    w, h = weights(), hessian()
    w[0, 0] = 4 * np.abs(w).max()
    method = GPTQ(weights=NVFP4())
    assert method.shared
    together, codes, _ = solve(method, w, h)
    part, *_ = together.split([16, w.shape[1] - 16])[1].parts
    np.testing.assert_array_equal(part.unpack(), np.asarray(codes)[:, 16:])
    w[1:, 16:32] /= 2
    other, changed, _ = solve(method, w, h)
    kept = [codes[:, :16], codes[:, 32:]]
    for a, b in zip(kept, [changed[:, :16], changed[:, 32:]]):
        np.testing.assert_array_equal(a, b)
    scales = [each.parts[0].global_scale for each in (together, other)]
    np.testing.assert_array_equal(*scales)


def test_block_size_changes_no_code():
    w, h = weights(), hessian()
    _, codes, _ = solve(METHOD, w, h)
    _, other, _ = solve(GPTQ(weights=INT4, block_size=80), w, h)
    assert (np.asarray(codes) == np.asarray(other)).mean() >= 0.999


def test_experts_are_solved_as_if_alone():
    w = np.stack([weights(seed=seed) for seed in range(2)])
    h = np.stack([hessian(), np.full((K, K), np.nan, np.float32)])
    many = jit(jax.vmap(partial(solution, METHOD)))(w, h)[1]
    for i in range(2):
        assert (np.asarray(many[i]) == np.asarray(solve(METHOD, w[i], h[i])[1])).all()


def test_scales_have_the_dtype_of_the_weights():
    w = jnp.asarray(weights(), jnp.bfloat16)
    part = solve(METHOD, w, hessian())[0].parts[0]
    expected = jit(INT4.fit)(w).scale
    assert part.scale.dtype == jnp.bfloat16
    np.testing.assert_array_equal(part.scale, expected)


def test_importance_weighs_the_search_of_scales():
    w, h = weights(), hessian()
    search = MSE(norm=2.0, grid=20, maxshrink=0.5)
    method = GPTQ(weights=INT4, search=search, importance=True, block_size=BLOCK)
    scale = solve(method, w, h)[0].parts[0].scale
    fit = partial(jit, static_argnums=1)(INT4.fit)
    expected = fit(jnp.asarray(w), search, jnp.diagonal(h)).scale
    np.testing.assert_array_equal(scale, expected)
    assert (np.asarray(scale) != np.asarray(fit(jnp.asarray(w), search).scale)).any()


def test_is_a_calibrated_method():
    assert isinstance(METHOD, Calibrated)
    assert hash(METHOD) == hash(GPTQ(weights=INT4, block_size=BLOCK))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"damping": 0}, "GPTQ.damping"),
        ({"block_size": 0}, "GPTQ.block_size"),
        ({"act_order": "sorted"}, "GPTQ.act_order"),
        ({"importance": True}, "GPTQ.importance"),
        ({"scheme": "W4A61"}, "unknown scheme"),
        ({"scheme": "W4A16", "weights": Int(4)}, "GPTQ.scheme"),
    ],
)
def test_bad_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        GPTQ(**fields)


@pytest.mark.parametrize("method", [qjax.GPTQ, qjax.GPTAQ])
def test_a_code_of_several_inputs_is_refused(method: Any):
    with pytest.raises(ValueError, match="codes one input after the other, and a code"):
        method(weights=qjax.Additive())


def test_vectors_are_the_whole_matrix_s():
    assert not qjax.QEP(qjax.RTN(weights=qjax.Additive())).shared
