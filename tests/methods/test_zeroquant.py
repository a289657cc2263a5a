"""ZeroQuant: groups of outputs, coded tokens, and the search of settings per layer."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.core.formats import Int, channel
from qjax.methods import RTN
from qjax.methods.base import DataFree
from qjax.methods.zeroquant import ZeroQuant, zeroquant_mixed
from qjax.quantize import quantize, quantize_with_report
from qjax.trace.apply import apply
from qjax.trace.control import QuantizationWarning
from qjax.zeroquant_search import bits_per_weight, choose, search_zeroquant

K, N = 64, 48
RNG = np.random.default_rng(0)
W = (RNG.normal(size=(K, N)) * np.exp(RNG.normal(size=N))).astype(np.float32)
X = RNG.normal(size=(10, K)).astype(np.float32)


def linear(params, x):
    return x @ params["w"]


@pytest.mark.parametrize("groups", [1, 3, 48])
@pytest.mark.parametrize("bits", [4, 8])
def test_groups_are_rows_of_the_transposed_weight(groups, bits):
    """The reference reshapes `[out, in]` to `[groups, -1]`, one scale for each."""
    method = ZeroQuant(bits, outputs=N // groups)
    found = method.solve(jnp.asarray(W))[0].decode(jnp.float32)
    flat, half = W.T.reshape(groups, -1), 2 ** (bits - 1)
    scale = np.abs(flat).max(1, keepdims=True) / np.float32((2**bits - 1) / 2)
    rounded = np.clip(np.round(flat / scale), -half, half - 1) * scale
    np.testing.assert_allclose(found, rounded.reshape(N, K).T, rtol=1e-6)


def test_more_groups_lose_less():
    errors = [
        np.square(np.asarray(ZeroQuant(4, n).solve(jnp.asarray(W))[0].decode()) - W)
        for n in (None, 16, 1)
    ]
    whole, paper, single = (e.sum() for e in errors)
    assert single < 0.7 * paper < 0.7 * whole


def test_tokens_are_coded_at_run_time():
    q = quantize(
        linear, {"w": jnp.asarray(W)}, ZeroQuant(8, 1), example=(X,), progress=False
    )
    scale = np.abs(X).max(1, keepdims=True) / np.float32(127.5)
    coded = np.clip(np.round(X / scale), -128, 127) * scale
    exact = coded @ np.asarray(q["w"].dequantize(), np.float64)
    np.testing.assert_allclose(apply(linear)(q, X), exact, rtol=2e-5, atol=1e-5)


def test_one_output_to_a_scale_is_w8a8():
    assert ZeroQuant(8, 1).format == RTN("W8A8").format == Int(8, channel())
    assert ZeroQuant(8, 1).activation == RTN("W8A8").activation
    assert ZeroQuant(activation_bits=None).activation is None
    assert isinstance(ZeroQuant(), DataFree) and hash(ZeroQuant())


def two(params, x):
    h = jnp.tanh(x @ params["attn"]["w"])
    return h @ params["mlp"]["w"]


PARAMS = {"attn": {"w": jnp.asarray(W)}, "mlp": {"w": jnp.asarray(W.T * 0.1)}}


def test_mixed_gives_int4_to_the_feed_forward_linears():
    _, report = quantize_with_report(
        two, PARAMS, zeroquant_mixed(outputs=8), example=(X,), progress=False
    )
    bits = {row.path: row.format.split()[0] for row in report}
    assert bits == {"attn/w": "int8", "mlp/w": "int4"}


def measured(name, method, params):
    """The relative output error of one linear, from the inputs themselves."""
    x = np.asarray(X, np.float64)
    if name == "mlp/w":
        x = np.asarray(jnp.tanh(X @ params["attn"]["w"]), np.float64)
    w = np.asarray(params[name.split("/")[0]]["w"])
    q = np.asarray(method.solve(jnp.asarray(w))[0].decode(jnp.float32), np.float64)
    return np.linalg.norm(x @ (w - q)) / np.linalg.norm(x @ w)


CANDIDATES = (ZeroQuant(4, 16), ZeroQuant(4, 1), ZeroQuant(8, 16), ZeroQuant(8, 1))


@pytest.mark.parametrize("tolerance", [0.2, 0.1, 0.02])
def test_search_takes_the_cheapest_within_the_tolerance(tolerance):
    recipe = search_zeroquant(two, PARAMS, [(X[:6],), (X[6:],)], CANDIDATES, tolerance)
    taken = {name: step for step in recipe for name in step.targets or ()}
    assert set(taken) == {"attn/w", "mlp/w"}
    for name, step in taken.items():
        errors = [measured(name, c, PARAMS) for c in CANDIDATES]
        w = PARAMS[name.split("/")[0]]["w"]
        bits = [bits_per_weight(w, c) for c in CANDIDATES]
        good = [b for e, b in zip(errors, bits) if e <= tolerance]
        number = next(i for i, c in enumerate(CANDIDATES) if c.format == step.format)
        assert errors[number] <= tolerance and bits[number] == min(good)
    q = quantize(two, PARAMS, recipe, example=(X,), progress=False)
    assert all(
        q[n.split("/")[0]]["w"].parts[0].format == s.format for n, s in taken.items()
    )


def test_search_in_layers_of_a_scan_decides_for_each():
    easy, wide = np.ones(K), np.exp(2 * RNG.normal(size=K))
    base = RNG.normal(size=(K, K)) / 8
    stack = jnp.asarray(np.stack([base * easy, base * wide]), jnp.float32)

    def scanned(params, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0]

    params = {"w": stack}
    candidates = (ZeroQuant(8, 64), ZeroQuant(8, 1))
    recipe = search_zeroquant(scanned, params, [(X,)], candidates, 0.02)
    assert [(s.outputs, s.targets) for s in recipe] == [(64, ("w/0",)), (1, ("w/1",))]
    q = quantize(scanned, params, recipe, example=(X,), progress=False)
    assert np.isfinite(apply(scanned)(q, X)).all()


def test_search_names_the_sites_that_no_candidate_serves():
    with pytest.warns(QuantizationWarning, match="attn/w.*most accurate"):
        recipe = search_zeroquant(
            two, PARAMS, [(X,)], CANDIDATES, 1e-5, targets="attn*"
        )
    assert [(s.bits, s.outputs, s.targets) for s in recipe] == [(8, 1, ("attn/w",))]


def test_choice_is_by_bits_then_by_error():
    assert choose([0.3, 0.1, 0.05], [4.0, 8.0, 8.0], 0.2) == 2
    assert choose([0.3, 0.1], [4.0, 8.0], 0.5) == 0


def test_names_with_the_letters_of_patterns_are_taken_literally():
    def f(params, x):
        return x @ params["a[0]"] + x @ params["a0"]

    params = {"a[0]": jnp.asarray(W), "a0": jnp.asarray(W)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        recipe = search_zeroquant(f, params, [(X,)], (ZeroQuant(),), 1.0)
        quantize(f, params, recipe, example=(X,), progress=False)


BAD = [
    ({"bits": 9}, ValueError, r"ZeroQuant\.bits"),
    ({"activation_bits": 1}, ValueError, r"ZeroQuant\.activation_bits"),
    ({"outputs": 0}, ValueError, r"ZeroQuant\.outputs"),
    ({"search": "mse"}, (TypeError, ValueError), "search"),
    ({"targets": 3}, TypeError, "targets"),
]


@pytest.mark.parametrize(("fields", "kind", "message"), BAD)
def test_bad_fields_are_named(fields, kind, message):
    with pytest.raises(kind, match=message):
        ZeroQuant(**fields)


BAD_SEARCH = [
    ({"candidates": ()}, "candidates is empty"),
    ({"candidates": (ZeroQuant(targets="a"),)}, "without targets"),
    ({"candidates": (RTN(),)}, "candidates"),
    ({"tolerance": 0}, "tolerance"),
    ({"calibration": []}, "at least one batch"),
    ({"targets": "nothing"}, "matches no site"),
]


@pytest.mark.parametrize(("fields", "message"), BAD_SEARCH)
def test_bad_searches_are_named(fields, message):
    with pytest.raises((TypeError, ValueError), match=message):
        search_zeroquant(two, PARAMS, **{"calibration": [(X,)], **fields})
