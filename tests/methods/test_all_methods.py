"""The ten laws that every method obeys. Adding a method is adding a row."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import lax

from qjax.core.formats import MSE, Int, group
from qjax.core.qtensor import Activation, dequantize, is_quantized
from qjax.core.ranges import MinMaxRange, MSERange
from qjax.io.checkpoint import restore, save
from qjax.methods import HQQ, LPLR, METHODS, RTN, LoftQ, LoRC
from qjax.methods.base import solution_of
from qjax.quantize import quantize
from qjax.trace.apply import apply
from qjax.trace.paths import flatten_with_paths

L, D, H, V = 2, 64, 160, 50  # H holds a partial last group
TOKENS = jnp.arange(12).reshape(3, 4)
KEY = jax.random.key(7)


def power_norm(p: float) -> Callable[[Any, Any], float]:
    return lambda w, q: float(np.mean(np.abs(w - q) ** p))


@dataclass(frozen=True)
class Better:
    """Law 6: `metric(method) / metric(baseline)` lies within `margin`."""

    baseline: Any
    metric: Callable[[Any, Any], float]
    margin: tuple[float, float]


@dataclass(frozen=True)
class Row:
    method: Any
    better: Better
    bad: tuple[tuple[dict[str, Any], str], ...]


FLOAT_ZERO = Int(3, group(64), zero="float")
BAD_RTN = (
    ({"scheme": "W4A61"}, "unknown scheme 'W4A61'"),
    ({"rounding": "up"}, "RTN.rounding"),
    ({"search": "mse"}, "search"),
    ({"calibrator": MinMaxRange()}, "RTN.calibrator .* nothing to calibrate"),
    ({"scheme": "FP8", "calibrator": "minmax"}, "RTN.calibrator must be"),
    ({"scheme": "NVFP4", "calibrator": MSERange()}, "cannot calibrate nvfp4"),
    ({"scheme": "W4A16", "weights": Int(4)}, "leave out weights"),
    ({"activations": Activation(Int(8))}, "needs RTN.weights"),
    ({"targets": 3}, "targets"),
    ({"ignore": ["head"]}, "ignore"),
)
BAD_HQQ = (
    ({"bits": 9}, "HQQ.bits"),
    ({"bits": 0}, "HQQ.bits"),
    ({"group_size": -1}, "HQQ.group_size"),
    ({"p": 0.0}, r"HQQ.p must be in \(0, 1\]"),
    ({"p": 1.5}, "HQQ.p"),
    ({"beta": -1.0}, "HQQ.beta"),
    ({"kappa": 0.5}, "HQQ.kappa"),
    ({"iters": 0}, "HQQ.iters"),
    ({"bits": 3, "weights": FLOAT_ZERO}, "leave out bits=3"),
    ({"weights": Int(4)}, 'zero="float"'),
    ({"targets": ("a", 1)}, "targets"),
)


BAD_RANK = (({"rank": 0}, "rank must be"), ({"scheme": "W4A61"}, "unknown scheme"))
BAD_LPLR = (
    ({"rank": 1.5}, r"LPLR.rank must be in \(0, 1\]"),
    ({"targets": 3}, "targets"),
)
G64 = Int(3, group(64))


def rounding_costs(scheme: str) -> Better:
    """Nearest against stochastic rounding: mean squared error s^2/12 against s^2/6."""
    random = RTN(scheme, rounding="stochastic")
    return Better(random, power_norm(2), (0.4, 0.6))


def clipping_pays(bits: int) -> Better:
    """The range of least error against the whole range, heavy tails."""
    whole = RTN(weights=Int(bits, group(64)))
    return Better(whole, power_norm(2.4), (0.0, 0.97))


def zero_point_pays(bits: int) -> Better:
    """The paper's claim: less l_p error (p = 0.7) than the grid it starts from."""
    start = RTN(weights=Int(bits, group(64), zero="float"))
    return Better(start, power_norm(0.7), (0.0, 0.99))


ROWS = {
    "rtn-w4a16": Row(RTN("W4A16"), rounding_costs("W4A16"), BAD_RTN),
    "rtn-w8a8": Row(RTN("W8A8"), rounding_costs("W8A8"), BAD_RTN),
    "rtn-fp8": Row(
        RTN("FP8_DYNAMIC"),
        Better(RTN("MXFP4A16"), power_norm(2), (0.0, 0.1)),
        BAD_RTN,
    ),
    "rtn-nvfp4": Row(
        RTN("NVFP4A16"),
        Better(RTN("MXFP4A16"), power_norm(2), (0.0, 0.9)),
        BAD_RTN,
    ),
    "rtn-nf4": Row(
        RTN("NF4"),
        Better(RTN(weights=Int(4, group(64))), power_norm(2), (0.0, 0.95)),
        BAD_RTN,
    ),
    "rtn-mse": Row(
        RTN(weights=Int(3, group(64)), search=MSE()), clipping_pays(3), BAD_RTN
    ),
    "hqq-2": Row(HQQ(bits=2), zero_point_pays(2), BAD_HQQ),
    "hqq-4": Row(HQQ(bits=4), zero_point_pays(4), BAD_HQQ),
    # The factors are bits that rounding alone has not: theirs are the paper's claims.
    "lorc": Row(
        LoRC(weights=G64, rank=8),
        Better(RTN(weights=G64), power_norm(2), (0.0, 0.9)),
        BAD_RANK,
    ),
    # Of one rank, and so of the same bits.
    "loftq": Row(
        LoftQ(weights=G64, rank=8),
        Better(LoRC(weights=G64, rank=8), power_norm(2), (0.0, 0.97)),
        (*BAD_RANK, ({"iters": 0}, "LoftQ.iters")),
    ),
    "lplr": Row(
        LPLR(rank=16, factors=Int(3)),
        Better(LPLR(rank=16, factors=Int(3), refit=False), power_norm(2), (0.0, 0.995)),
        BAD_LPLR,
    ),
}
rows = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
weight_only = pytest.mark.parametrize(
    "row",
    [r for r in ROWS.values() if r.method.activation is None],
    ids=[n for n, r in ROWS.items() if r.method.activation is None],
)


def block(p, x, see=lambda x: x):
    h = jnp.tanh(see(x * p["norm"]) @ p["up"]["kernel"])
    return x + see(h) @ p["down"]["kernel"]


def unrolled(p, tokens, see=lambda x: x):
    x = p["embed"][tokens]
    for layer in p["layers"]:
        x = block(layer, x, see)
    return x @ p["embed"].T


def scanned(p, tokens):
    x = p["embed"][tokens]
    x, _ = lax.scan(lambda x, layer: (block(layer, x), None), x, p["layers"])
    return x @ p["embed"].T


def make(dtype=jnp.float32):
    rng = np.random.default_rng(3)

    def heavy(*shape):  # outliers, as in a language model's weights
        return jnp.asarray(rng.standard_t(5, shape) * 0.05, dtype)

    def layer():
        norm = jnp.ones(D, dtype)
        return {
            "norm": norm,
            "up": {"kernel": heavy(D, H)},
            "down": {"kernel": heavy(H, D)},
        }

    return {"embed": heavy(V, D), "layers": [layer() for _ in range(L)]}


def stack(params):
    layers = jax.tree.map(lambda *x: jnp.stack(x), *params["layers"])
    return {**params, "layers": layers}


def run(method, f, params):
    return quantize(f, params, method, [(TOKENS,)], key=KEY, progress=False)


@cache
def flat(method, dtype=jnp.float32):
    """The unrolled model, quantized once for all laws that only look at it."""
    return run(method, unrolled, make(dtype))


@cache
def deep(method, dtype=jnp.float32):
    return run(method, scanned, stack(make(dtype)))


def decoded(found):
    return solution_of(found).decoded()


def same(a, b):
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in leaves)


@rows
def test_1_paths_are_unchanged(row):
    before = [path for path, _ in flatten_with_paths(make())]
    after = flatten_with_paths(flat(row.method))
    assert [path for path, _ in after] == before
    low = [path for path, leaf in after if is_quantized(leaf)]
    wanted = [f"layers/{i}/{n}/kernel" for i in range(L) for n in ("down", "up")]
    assert low == wanted


@rows
def test_2_dequantize_has_shape_and_dtype(row):
    for dtype in (jnp.float32, jnp.bfloat16):
        back = dequantize(flat(row.method, dtype))
        kept = make(dtype)
        for x, w in zip(jax.tree.leaves(back), jax.tree.leaves(kept), strict=True):
            assert (x.shape, x.dtype) == (w.shape, w.dtype)
            assert bool(jnp.isfinite(x).all())


def per_token_int8(x):
    """compressed-tensors' rule in numpy, independent of qjax's formats."""
    scale = np.maximum(np.abs(x).max(-1, keepdims=True), 1e-12) / np.float32(127.5)
    return (np.clip(np.round(x / scale), -128, 127) * scale).astype(np.float32)


def per_token_fp8(x):
    scale = np.maximum(np.abs(x).max(-1, keepdims=True), 1e-12) / np.float32(448)
    return (x / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale


SEEN = {"rtn-w8a8": per_token_int8, "rtn-fp8": per_token_fp8}


@pytest.mark.parametrize("name", ROWS)
def test_3_apply_is_the_function_on_dequantized_weights(name):
    row = ROWS[name]
    qparams = flat(row.method)
    given = apply(unrolled)(qparams, TOKENS)
    see = SEEN.get(name, lambda x: x)
    values = dequantize(qparams)  # out here, where its operations are compiled already
    with jax.default_matmul_precision("highest"):
        expected = unrolled(values, TOKENS, lambda x: jnp.asarray(see(np.asarray(x))))
    # Accumulation order alone; one code of one activation may still round apart.
    slack = 2e-6 if row.method.activation is None else 2e-3
    np.testing.assert_allclose(given, expected, rtol=0, atol=slack)


@rows
def test_4_scan_equals_unrolled(row):
    one, all_ = flat(row.method), deep(row.method)
    assert same(stack(one)["layers"], all_["layers"])
    if row.method.activation is None:
        a, b = apply(unrolled)(one, TOKENS), apply(scanned)(all_, TOKENS)
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@rows
def test_4_scan_equals_unrolled_in_bf16(row):
    one, all_ = (quantized(row.method, jnp.bfloat16) for quantized in (flat, deep))
    assert same(stack(one)["layers"], all_["layers"])
    a, b = apply(unrolled)(one, TOKENS), apply(scanned)(all_, TOKENS)
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    # Eight bits of mantissa through three residual layers.
    np.testing.assert_allclose(a, b, rtol=0, atol=2**-6 * np.abs(a).max())


@rows
def test_5_jit_equals_no_jit(row):
    w = make()["layers"][0]["down"]["kernel"]
    solve = jax.jit(row.method.solve)
    a, b = (decoded(s(w, None)) for s in (row.method.solve, solve))
    step = float(jnp.abs(w).max()) / 2
    assert float(jnp.mean(jnp.abs(a - b) > 1e-6)) < 0.01
    assert float(jnp.abs(a - b).max()) < step
    qparams = flat(row.method)
    y, z = apply(unrolled)(qparams, TOKENS), jax.jit(apply(unrolled))(qparams, TOKENS)
    slack = 2e-6 if row.method.activation is None else 2e-3
    np.testing.assert_allclose(np.asarray(y), np.asarray(z), rtol=0, atol=slack)


@rows
def test_6_better_than_its_baseline(row):
    rng = np.random.default_rng(11)
    w = jnp.asarray(rng.standard_t(5, (256, 96)) * 0.02, jnp.float32)
    key = jax.random.key(1)

    def error(method):
        found = decoded(jax.jit(method.solve)(w, key))
        return row.better.metric(np.asarray(w), np.asarray(found))

    low, high = row.better.margin
    assert low < error(row.method) / error(row.better.baseline) < high


@rows
def test_7_deterministic_for_a_key(row):
    assert same(flat(row.method), run(row.method, unrolled, make()))


def test_7_stochastic_rounding_follows_the_key():
    method, params = RTN("W4A16", rounding="stochastic"), make()
    one, two = (run(method, unrolled, params) for _ in range(2))
    assert same(one, two)
    other = quantize(
        unrolled, params, method, [(TOKENS,)], key=jax.random.key(8), progress=False
    )
    assert not same(one, other)
    assert same(stack(one)["layers"], run(method, scanned, stack(params))["layers"])


@rows
def test_8_save_and_load(row, tmp_path):
    qparams = deep(row.method)
    save(tmp_path / "model", qparams, recipe=row.method)
    assert same(restore(tmp_path / "model"), qparams)


@rows
def test_9_bf16_weights_float32_statistics(row):
    """Codes are those of the same values in float32, scales merely stored shorter."""
    w16 = make(jnp.bfloat16)["layers"][0]["down"]["kernel"]
    formats = {}
    if isinstance(row.method, (LoftQ, LoRC, LPLR)):
        with jax.numpy_dtype_promotion("strict"):
            near_in_float32(jax.jit(row.method.solve), w16)
        return
    if hasattr(row.method.format, "scale_dtype"):
        short = replace(row.method.format, scale_dtype="bfloat16")
        formats = {
            "weights": short,
            "scheme": None,
            "activations": row.method.activation,
        }
        if isinstance(row.method, HQQ):
            formats = {"weights": short, "bits": None, "group_size": None}
    method = replace(row.method, **formats)
    with jax.numpy_dtype_promotion("strict"):
        solve = jax.jit(method.solve)
        short, wide = (solve(w, None) for w in (w16, w16.astype(jnp.float32)))
    assert same(short, wide)


def near_in_float32(solve, w):
    """Factors and scales are stored shorter, which moves what is coded beside them."""
    wide = w.astype(jnp.float32)
    low, high = (decoded(solve(x)) - wide for x in (w, wide))
    assert float(jnp.linalg.norm(low)) < 1.02 * float(jnp.linalg.norm(high))
    stored = {x.dtype for x in jax.tree.leaves(solve(w))}
    assert jnp.dtype("bfloat16") in stored and jnp.dtype("float32") not in stored


@rows
def test_10_bad_hyperparameters_are_named(row):
    for fields, message in row.bad:
        with pytest.raises((TypeError, ValueError), match=message):
            type(row.method)(**fields)


def test_every_row_is_of_a_registered_method():
    """That each has a row here or there: `test_all_calibrated.py`."""
    here = {RTN, HQQ, LoRC, LoftQ, LPLR}
    assert {type(row.method) for row in ROWS.values()} == here <= set(METHODS)


@rows
def test_methods_are_hashable_and_print_their_fields(row):
    assert hash(row.method) == hash(replace(row.method))
    assert type(row.method).__name__ in repr(row.method)
