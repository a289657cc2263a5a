"""Low rank beside low bits: the papers' formulas in numpy, bits, and what is gained."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.core.coded import Coded, encode
from qjax.core.formats import Int, channel, group
from qjax.core.qtensor import Activation, factor
from qjax.methods.lplr import fitted

K, N, R = 48, 32, 4
INT3 = Int(3, group(16))
ACTS = Activation(Int(4, group(16)))
RNG = np.random.default_rng(0)
W = (RNG.standard_t(5, (K, N)) * 0.1).astype(np.float32)
MIX = RNG.normal(size=(K, K)) * np.exp(RNG.normal(size=K))
X = (RNG.normal(size=(256, K)) @ MIX).astype(np.float32)


def f(params, x):
    return x @ params["w"]


@cache
def solved(recipe):
    return qjax.quantize(f, {"w": W}, recipe, [(X,)], progress=False)["w"]


def factors(q):
    left, right = (factor(each, jnp.float32) for each in (q.left, q.right))
    return np.float64(left) @ np.float64(right)


def codes(q):
    return sum(np.float64(part.decode()) for part in q.parts)


def output_error(q):
    return np.linalg.norm(np.float64(X) @ (np.float64(q.dequantize()) - W))


def truncated(matrix, rank=R):
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


def weighing(name):
    """What each paper multiplies the error by, `[K, K]`."""
    x = np.float64(X)
    if name == "LoRC":
        return np.eye(K)
    if name == "LQER":
        size = np.abs(x).mean(0)
        return np.diag(size / np.sqrt(size.min() * size.max()))
    if name == "QERA":
        values, vectors = np.linalg.eigh(x.T @ x / len(x))
        return (vectors * np.sqrt(values)) @ vectors.T
    return np.diag(np.sqrt((x**2).mean(0)))


METHODS = {
    "LoRC": qjax.LoRC(rank=R),
    "LQER": qjax.LQER(rank=R),
    "QERA diagonal": qjax.QERA(rank=R, exact=False),
    "QERA": qjax.QERA(rank=R),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("order", ["static", "group"])
def test_repairs_are_the_papers_formulas(name, order):
    """Also behind features in another order."""
    q = solved((qjax.GPTQ(weights=INT3, act_order=order), METHODS[name]))
    move = np.eye(K)
    if q.moved:
        move = np.float64(q.acts[0].t_in.left(jnp.eye(K)))
    d = weighing(name)
    expected = np.linalg.solve(d, truncated(d @ (W - move @ codes(q))))
    np.testing.assert_allclose(move @ factors(q), expected, atol=2e-3 * np.abs(W).max())


def test_each_is_better_for_outputs_than_the_one_before():
    """At the same bits, behind the same codes; the whole `E[x x^T]` is the optimum."""
    base = qjax.RTN(weights=INT3)
    none = output_error(solved(base))
    plain, lqer, diagonal, exact = (
        output_error(solved((base, METHODS[name])))
        for name in ("LoRC", "LQER", "QERA diagonal", "QERA")
    )
    assert exact < 0.97 * min(lqer, diagonal)
    assert max(lqer, diagonal) < 0.9 * plain < 0.9 * none


def test_alone_they_round_to_nearest_first():
    for make in (qjax.LoRC, qjax.LQER, qjax.QERA):
        alone = solved(make(weights=INT3, rank=R))
        behind = solved((qjax.RTN(weights=INT3), make(rank=R)))
        np.testing.assert_array_equal(codes(alone), codes(behind))
        np.testing.assert_allclose(factors(alone), factors(behind), atol=1e-6)


def test_lorc_alone_needs_no_data():
    given = qjax.LoRC(weights=INT3, rank=R), qjax.LoftQ(rank=R), qjax.LPLR()
    for method in given:
        q = qjax.quantize(f, {"w": W}, method, example=(X,), progress=False)["w"]
        assert np.isfinite(output_error(q))


def test_bits_count_the_factors():
    base = solved(qjax.RTN(weights=INT3)).bits_per_weight
    plain = solved(qjax.LoRC(weights=INT3, rank=R)).bits_per_weight
    assert plain == base + 32 * R * (K + N) / (K * N)
    coded = solved(qjax.LoRC(weights=INT3, rank=R, factors=Int(8)))
    scales = 32 * (R + N)
    assert coded.bits_per_weight == base + (8 * R * (K + N) + scales) / (K * N)
    low = solved(qjax.LPLR(rank=8, factors=Int(4)))
    bits = 4 * 8 * (K + N) + 32 * (8 + N)
    assert low.bits_per_weight == bits / (K * N) and not low.parts


def test_coded_factors_lose_little():
    base = qjax.GPTQ(weights=INT3)
    exact, coded = (
        solved((base, qjax.QERA(rank=R, factors=each))) for each in (None, Int(8))
    )
    assert isinstance(coded.left, Coded) and coded.left.format == Int(8, channel())
    assert output_error(coded) < 1.02 * output_error(exact)


def test_loftq_is_between_rounding_and_a_better_start():
    # Large enough for its turns to gain as much wherever codes fall.
    w = (np.random.default_rng(0).standard_t(5, (256, 192)) * 0.1).astype(np.float32)

    def error(recipe):
        q = qjax.quantize(f, {"w": w}, recipe, [(w.T,)], progress=False)
        return np.linalg.norm(q["w"].dequantize() - w)

    once, often = (
        error(qjax.LoftQ(weights=INT3, rank=16, iters=iters)) for iters in (1, 5)
    )
    assert often < 0.97 * once < 0.97 * error(qjax.RTN(weights=INT3))


def test_lplr_fits_the_second_factor_to_the_coded_first():
    basis = np.float64(encode(jnp.asarray(W[:, :8]), Int(3)).decode())
    expected = np.linalg.lstsq(basis, W, rcond=None)[0]
    np.testing.assert_allclose(
        fitted(jnp.float32(basis), jnp.asarray(W)), expected, atol=1e-5
    )
    fit, plain = (
        solved(qjax.LPLR(rank=0.5, factors=Int(3), refit=refit))
        for refit in (True, False)
    )
    assert np.linalg.norm(fit.dequantize() - W) < np.linalg.norm(plain.dequantize() - W)
    nearest = np.linalg.norm(truncated(np.float64(W), 16) - W)  # of float factors
    assert np.linalg.norm(fit.dequantize() - W) > nearest


def branch_and_rest(x, q):
    """Equation 5 of SVDQuant in numpy: the branch takes `x'` as it is."""
    scale = np.abs(x.reshape(len(x), -1, 16)).max(-1, keepdims=True) / np.float32(7.5)
    coded = np.clip(np.round(x.reshape(len(x), -1, 16) / scale), -8, 7) * scale
    return x @ factors(q) + np.float64(coded.reshape(x.shape)) @ codes(q)


def test_svdquant_is_equation_5():
    then = qjax.RTN(weights=Int(4, group(16)), activations=ACTS)
    q = solved(qjax.SVDQuant(then, rank=R))
    np.testing.assert_allclose(factors(q), truncated(np.float64(W)), atol=1e-5)
    rest = encode(jnp.float32(W - factors(q)), then.format)
    np.testing.assert_allclose(codes(q), np.float64(rest.decode()), atol=1e-6)
    given = qjax.apply(f)({"w": q}, X)
    expected = branch_and_rest(X, q)
    np.testing.assert_allclose(given, expected, atol=2e-3 * np.abs(expected).max())


def test_svdquant_takes_in_what_smoothing_moves_into_the_weights():
    """Outliers of the input, 40 times the rest: rounding, smoothing, and the branch."""
    x = X / X.std(0)
    x[:, :3] *= 40
    then = qjax.RTN(weights=Int(4, group(16)), activations=ACTS)
    smooth = qjax.SmoothQuant(online=True)

    def error(*recipe):
        q = qjax.quantize(f, {"w": W}, recipe, [(x,)], progress=False)
        return np.linalg.norm(qjax.apply(f)(q, x) - x @ W)

    plain, smoothed = error(then), error(smooth, then)
    split = error(smooth, qjax.SVDQuant(then, rank=R))
    assert split < 0.9 * smoothed < 0.9 * plain


def test_branches_add_up():
    """A repair behind a branch, and a branch around codes of another order."""
    then = qjax.GPTQ(weights=INT3, act_order="group")
    q = solved((qjax.SVDQuant(then, rank=R), qjax.QERA(rank=R)))
    assert q.left.shape == (K, 2 * R)
    assert output_error(q) < 0.9 * output_error(solved(qjax.SVDQuant(then, rank=R)))


def test_recipes_as_text_and_as_starts_of_adapters():
    recipe = (
        qjax.GPTQ("W4A16"),
        qjax.QERA(rank=R, factors=Int(8)),
        qjax.SVDQuant(qjax.GPTQ("W4A4"), rank=R),
    )
    assert qjax.read_recipe(qjax.write_recipe(recipe)) == recipe
    with pytest.raises(ValueError, match=r"QERA\.rank is 4, but the"):
        qjax.QERA(rank=R).split(jnp.asarray(W), 2, jnp.eye(K))
    with pytest.raises(ValueError, match=r"LoftQ\.factors is int8"):
        qjax.LoftQ(factors=Int(8)).split(jnp.asarray(W), 2, None)


def test_refusals():
    with pytest.raises(ValueError, match="rank 33 is more than a matrix of 48 x 32"):
        solved(qjax.LoRC(weights=INT3, rank=33))
    with pytest.raises(ValueError, match=r"the recipe \(QERA\) quantizes no weights"):
        solved(qjax.QERA(rank=R))
    key = jax.random.key(0)
    tuned = qjax.AutoRound(weights=INT3, iters=2), qjax.QERA(rank=R)
    with pytest.raises(ValueError, match="QERA cannot repair"):
        qjax.quantize(f, {"w": W}, tuned, [(X,)], key=key, progress=False)


@pytest.mark.parametrize(
    "make",
    [qjax.LPLR, qjax.LoRC, qjax.LoftQ, lambda: qjax.SVDQuant(qjax.RTN("W4A16"))],
)
def test_the_format_of_factors_is_one(make):
    made = make()
    # No type checker stands before the method's own check.
    object.__setattr__(made, "factors", "int8")
    with pytest.raises(ValueError, match=r"\.factors must be a format .* got 'int8'"):
        made.__post_init__()
