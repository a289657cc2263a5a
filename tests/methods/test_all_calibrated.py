"""The laws for recipes that need data. Adding a calibrated method is adding a row.

They are those of `test_all_methods.py`; better (law 6) is measured on the output of a
site, for inputs like those seen in calibration.
"""

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import qjax
from qjax.core.formats import Float, Int, group
from qjax.core.qtensor import SiteActs, dequantize, is_quantized
from qjax.methods import METHODS
from qjax.trace.paths import flatten_with_paths

L, D, H, V = 2, 64, 96, 50
KEY = jax.random.key(7)
G32 = Int(3, group(32))
ASYM = Int(3, group(32), symmetric=False, zero="int")
RTN3 = qjax.RTN(weights=G32)
BAD_SCHEME = ({"scheme": "W4A61"}, "unknown scheme 'W4A61'")


@dataclass(frozen=True)
class Row:
    """A recipe, its baseline, the margin of its output error, and bad fields."""

    recipe: Any
    baseline: Any
    margin: float
    bad: tuple[tuple[dict[str, Any], str], ...] = ()

    @property
    def method(self) -> Any:
        """The method that the row is of: a repair, a transform, or what quantizes."""
        steps = self.recipe if isinstance(self.recipe, tuple) else (self.recipe,)
        return next((s for s in steps if hasattr(s, "repair")), steps[0])


def gptq(**fields: Any) -> Any:
    return qjax.GPTQ(weights=G32, **fields)


BAD_GPTQ = (
    BAD_SCHEME,
    ({"damping": 0.0}, "GPTQ.damping"),
    ({"block_size": 0}, "GPTQ.block_size"),
    ({"act_order": "sometimes"}, "GPTQ.act_order"),
    ({"targets": 3}, "targets"),
)
BAD_AWQ = (
    BAD_SCHEME,
    ({"n_grid": 0}, "AWQ.n_grid"),
    ({"duo_scaling": "maybe"}, "AWQ.duo_scaling"),
    ({"objective": "model"}, "AWQ.objective"),
)
BAD_RANK = (BAD_SCHEME, ({"rank": 0}, "rank must be"))
BAD_SMOOTH = (({"smoothing_strength": 1.5}, "SmoothQuant.smoothing_strength"),)
ROWS = {
    "gptq": Row(gptq(), RTN3, 0.9, BAD_GPTQ),
    "gptq-off": Row(gptq(act_order="off"), RTN3, 0.9),
    "gptq-dynamic": Row(gptq(act_order="dynamic"), RTN3, 0.9),
    "gptq-group": Row(gptq(act_order="group"), RTN3, 0.9),
    "gptq-asym": Row(qjax.GPTQ(weights=ASYM), gptq(), 1.0),
    "gptaq": Row(qjax.GPTAQ(weights=G32), RTN3, 0.9, (({"alpha": 2}, "alpha"),)),
    "qep": Row(qjax.QEP(then=gptq()), RTN3, 0.9),
    "imatrix": Row(qjax.IMatrix(weights=G32), RTN3, 0.97, (BAD_SCHEME,)),
    "sequential-mse": Row(qjax.SequentialMSE(weights=G32), RTN3, 0.95, (BAD_SCHEME,)),
    "awq": Row((qjax.AWQ(), RTN3), RTN3, 1.0, BAD_AWQ),
    "smoothquant": Row(
        (qjax.SmoothQuant(), qjax.RTN("W8A8")), qjax.RTN("W8A8"), 1.1, BAD_SMOOTH
    ),
    "simple-ptq": Row(
        qjax.SimplePTQ("FP8"), qjax.RTN("MXFP4"), 0.5,
        (({"calibrator": "minmax"}, "calibrator"),),
    ),
    "eetq": Row(qjax.EETQ(), qjax.RTN("W4A16"), 0.2),
    "llm-int8": Row(
        qjax.LLMInt8(), qjax.RTN("W4A16"), 0.3, (({"threshold": -1.0}, "threshold"),)
    ),
    "zeroquant": Row(qjax.ZeroQuant(), qjax.RTN("W4A8"), 0.4),
    "autoround": Row(
        qjax.AutoRound(weights=G32, iters=50), gptq(), 1.0,
        (BAD_SCHEME, ({"iters": 0}, "iters"), ({"lr": -1.0}, "lr"),
         ({"scheme": "FP8"}, "static"), ({"scheme": "NF4"}, "integer codes")),
    ),
    "brecq": Row(
        qjax.BRECQ(weights=G32, iters=100, lr=0.03, batch_size=8), RTN3, 0.6,
        (BAD_SCHEME, ({"warmup": 2.0}, "warmup")),
    ),
    "omniquant": Row(
        qjax.OmniQuant(weights=ASYM, iters=50, lr=0.05), qjax.RTN(weights=ASYM), 0.98,
        (BAD_SCHEME, ({"lr": 0.0}, "lr")),
    ),
    "efficientqat": Row(
        qjax.EfficientQAT(weights=ASYM, iters=60, lr=1e-3, weight_lr=1e-3),
        qjax.RTN(weights=ASYM), 0.7, (BAD_SCHEME, ({"weight_lr": -1.0}, "weight_lr")),
    ),
    "zeroquant-lkd": Row(
        qjax.ZeroQuantLKD(weights=G32, iters=60, lr=1e-3), RTN3, 0.7,
        (BAD_SCHEME, ({"batch_size": 0}, "batch_size")),
    ),
    "lorc": Row((gptq(), qjax.LoRC(rank=4)), gptq(), 0.9, BAD_RANK),
    # Of one rank, and so of the same bits.
    "lqer": Row(
        (gptq(), qjax.LQER(rank=4)), (gptq(), qjax.LoRC(rank=4)), 1.0, BAD_RANK
    ),
    "qera": Row(
        (gptq(), qjax.QERA(rank=4, factors=Int(8))),
        (gptq(), qjax.LQER(rank=4)), 0.97, BAD_RANK,
    ),
    "qera-alone": Row(
        qjax.QERA(weights=G32, rank=4), qjax.LQER(weights=G32, rank=4), 0.9,
    ),
    "svdquant": Row(
        qjax.SVDQuant(qjax.RTN("W4A4"), rank=4),
        (qjax.RTN("W4A4"), qjax.LoRC(rank=4)), 0.9,
        (({"rank": 0, "then": RTN3}, "SVDQuant.rank"),
         ({"then": qjax.QEP(gptq())}, "a residual"), ({"then": 4}, "then must be")),
    ),
    "rptq": Row(qjax.RPTQ(then=qjax.RTN(weights=Int(4))), qjax.RTN("W4A4"), 0.9),
    "bias-correction": Row((RTN3, qjax.BiasCorrection()), RTN3, 1.0),
    "equalization": Row((qjax.CrossLayerEqualization(), RTN3), RTN3, 1.5),
}  # fmt: skip
rows = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)


def quantizer(row: Row) -> Any:
    steps = row.recipe if isinstance(row.recipe, tuple) else (row.recipe,)
    return next(s for s in steps if hasattr(s, "solve") or hasattr(s, "solve_site"))


def block(p, x, linear=jnp.matmul):
    h = jnp.tanh(linear(x * p["norm"], p["up"]["kernel"]))
    return x + linear(h, p["down"]["kernel"])


def unrolled(p, tokens, linear=jnp.matmul):
    x = p["embed"][tokens]
    for layer in p["layers"]:
        x = block(layer, x, linear)
    return x @ p["embed"].T


def scanned(p, tokens):
    x = p["embed"][tokens]
    x, _ = lax.scan(lambda x, layer: (block(layer, x), None), x, p["layers"])
    return x @ p["embed"].T


@cache
def make(dtype=jnp.float32):
    rng = np.random.default_rng(3)

    def draw(*shape, spread=0.1):
        return jnp.asarray(rng.standard_t(5, shape) * spread, dtype)

    def layer():
        norm = jnp.asarray(np.exp(rng.normal(size=D)), dtype)
        return {
            "norm": norm,
            "up": {"kernel": draw(D, H)},
            "down": {"kernel": draw(H, D)},
        }

    return {"embed": draw(V, D, spread=1.0), "layers": [layer() for _ in range(L)]}


def stack(params):
    layers = jax.tree.map(lambda *x: jnp.stack(x), *params["layers"])
    return {**params, "layers": layers}


def batches():
    rng = np.random.default_rng(5)
    return [(rng.integers(0, V, (8, 16)).astype(np.int32),) for _ in range(3)]


TOKENS = jnp.asarray(batches()[0][0][:3, :6])


def run(recipe, f, params):
    return qjax.quantize(f, params, recipe, batches(), key=KEY, progress=False)


@cache
def flat(recipe, dtype=jnp.float32):
    return run(recipe, unrolled, make(dtype))


def same(a, b):
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in leaves)


@rows
def test_1_2_paths_shapes_and_dtypes(row):
    for dtype in (jnp.float32, jnp.bfloat16):
        quantized, kept = flat(row.recipe, dtype), make(dtype)
        before = [path for path, _ in flatten_with_paths(kept)]
        assert [path for path, _ in flatten_with_paths(quantized)] == before
        low = [p for p, leaf in flatten_with_paths(quantized) if is_quantized(leaf)]
        assert low == [
            f"layers/{i}/{n}/kernel" for i in range(L) for n in ("down", "up")
        ]
        back = dequantize(quantized)
        for x, w in zip(jax.tree.leaves(back), jax.tree.leaves(kept), strict=True):
            assert (x.shape, x.dtype) == (w.shape, w.dtype)
            assert bool(jnp.isfinite(x).all())


def seen(x, acts):
    """The values of `x[M, K]` that the site contracts, in numpy, from the papers."""
    activation = acts.activation
    order = np.arange(x.shape[-1]) if acts.t_in is None else np.asarray(acts.t_in.index)
    back = np.argsort(order)
    if not activation.dynamic and isinstance(activation.format, Float):
        scale = np.asarray(acts.scale)
        limit = np.float32(448)
        return np.clip(x / scale, -limit, limit).astype("float8_e4m3fn") * scale
    if not activation.dynamic:
        scale, zero = (np.asarray(v)[:, 0] for v in (acts.scale, acts.zero))
        top = 2**activation.format.bits - 1
        codes = np.clip(np.round(x[:, order] / scale) + zero, 0, top)
        return ((codes - zero) * scale)[:, back]
    rule, half = activation.format.scale_rule, 2 ** (activation.format.bits - 1)
    given = x.astype(np.float16).astype(np.float32) if rule == "float16" else x
    reaches = np.abs(given) >= (activation.outliers or np.inf)
    below = np.abs(np.where(reaches, 0, given)).max(-1, keepdims=True)
    scale = below / np.float32(half - (1 if rule in ("narrow", "float16") else 0.5))
    coded = np.clip(np.round(given / scale), -half, half - 1) * scale
    return np.where(reaches.any(0), x, coded)


def reference_linear(x, leaf):
    """A site of a quantized leaf: coded input, decoded weight, factors, bias."""
    acts = leaf.acts[0] if leaf.acts else SiteActs()
    flat_x = np.asarray(x).reshape(-1, x.shape[-1])
    y = np.float64(0)
    if acts.activation is not None:
        if leaf.left is not None:  # which see the input before it is coded
            left, right = (np.asarray(m, np.float64) for m in (leaf.left, leaf.right))
            y = flat_x.astype(np.float64) @ left @ right
            leaf = replace(leaf, left=None, right=None)
        flat_x = seen(flat_x, acts).astype(np.float32)
    y = y + flat_x.astype(np.float64) @ np.asarray(dequantize(leaf), np.float64)
    y = y if leaf.bias is None else y + np.asarray(leaf.bias, np.float64)
    return jnp.asarray(y.reshape(*x.shape[:-1], -1), jnp.float32)


@rows
def test_3_apply_is_the_function_on_dequantized_weights(row):
    quantized = flat(row.recipe)
    rounding = 1e-6 if quantizer(row).activation is None else 2e-4

    def close(given, expected):
        slack = rounding * float(jnp.abs(expected).max())
        np.testing.assert_allclose(given, expected, rtol=0, atol=slack)

    # Site by site: an input on the edge of two codes may fall to another one where sums
    # are taken in another order.
    def linear(x, leaf):
        given = qjax.apply(lambda p, x: x @ p["w"])({"w": leaf}, x)
        with jax.default_matmul_precision("highest"):
            close(given, reference_linear(x, leaf))
        return given

    close(qjax.apply(unrolled)(quantized, TOKENS), unrolled(quantized, TOKENS, linear))


@rows
def test_4_scan_equals_unrolled(row):
    deep = run(row.recipe, scanned, stack(make()))
    assert same(stack(flat(row.recipe))["layers"], deep["layers"])


@pytest.mark.parametrize("name", ["gptq", "awq", "smoothquant"])
def test_4_scan_equals_unrolled_in_bf16(name):
    recipe, dtype = ROWS[name].recipe, jnp.bfloat16
    one, deep = flat(recipe, dtype), run(recipe, scanned, stack(make(dtype)))
    assert same(stack(one)["layers"], deep["layers"])
    a, b = qjax.apply(unrolled)(one, TOKENS), qjax.apply(scanned)(deep, TOKENS)
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    # Eight bits of mantissa through two residual layers.
    np.testing.assert_allclose(a, b, rtol=0, atol=2**-6 * np.abs(a).max())


SITES = ("gptq", "gptq-group", "gptaq", "qep", "imatrix", "sequential-mse", "rptq")


def measured(method, *dtypes):
    """What the method asks to know of an input, and of how it has drifted."""
    rng = np.random.default_rng(9)
    full = rng.normal(size=(200, D)) * np.exp(rng.normal(size=D))
    x, full = (jnp.asarray(a) for a in (full + rng.normal(size=full.shape), full))
    for dtype in dtypes:
        x, full = x.astype(dtype), full.astype(dtype)
    with jax.numpy_dtype_promotion("strict"):
        return {
            name: each.update(each.init(D), x, jnp.ones(200), full)
            for name, each in method.statistics.items()
        }


@pytest.mark.parametrize("name", SITES)
def test_5_jit_equals_no_jit(name):
    method, w = ROWS[name].method, make()["layers"][0]["up"]["kernel"][:, :16]
    states = measured(method, jnp.float32)
    stats = {n: each.finalize(states[n]) for n, each in method.statistics.items()}

    def solve(w, stats):
        return method.solve_site(w, stats, None).decoded()

    a, b = solve(w, stats), jax.jit(solve)(w, stats)
    # A code on the edge between two may fall to either side.
    assert float(jnp.mean(jnp.abs(a - b) > 1e-5)) < 0.01
    assert float(jnp.abs(a - b).max()) < float(jnp.abs(w).max()) / 2
    q = flat(ROWS[name].recipe)
    y, z = qjax.apply(unrolled)(q, TOKENS), jax.jit(qjax.apply(unrolled))(q, TOKENS)
    slack = 1e-6 if method.activation is None else 2e-4
    np.testing.assert_allclose(y, z, rtol=0, atol=slack * float(jnp.abs(y).max()))


@rows
def test_9_statistics_are_float32(row):
    """Those of an input in bf16 are those of the same values in float32."""
    steps = row.recipe if isinstance(row.recipe, tuple) else (row.recipe,)
    for step in (s for s in steps if getattr(s, "statistics", {})):
        short = measured(step, jnp.bfloat16)
        assert {x.dtype for x in jax.tree.leaves(short)} == {jnp.dtype("float32")}
        assert same(short, measured(step, jnp.bfloat16, jnp.float32))


def output_error(recipe) -> float:
    """Of the logits, for the calibration inputs."""
    quantized = flat(recipe)
    pairs = [
        (qjax.apply(unrolled)(quantized, jnp.asarray(b)), unrolled(make(), b))
        for (b,) in batches()
    ]
    return sum(float(jnp.sum(jnp.square(a - b))) for a, b in pairs)


@rows
def test_6_better_than_its_baseline(row):
    assert output_error(row.recipe) < row.margin * output_error(row.baseline)


@rows
def test_5_7_deterministic(row):
    assert same(flat(row.recipe), run(row.recipe, unrolled, make()))


@rows
def test_8_save_and_load(row, tmp_path):
    quantized = flat(row.recipe)
    qjax.save(tmp_path / "model", quantized, recipe=row.recipe)
    back = qjax.restore(tmp_path / "model")
    assert same(back, quantized)
    a, b = (jax.jit(qjax.apply(unrolled))(q, TOKENS) for q in (back, quantized))
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@rows
def test_10_bad_hyperparameters_are_named(row):
    for fields, message in row.bad:
        with pytest.raises((TypeError, ValueError), match=message):
            type(row.method)(**fields)


def test_every_registered_method_has_a_row():
    steps = [
        step
        for row in ROWS.values()
        for step in (row.recipe if isinstance(row.recipe, tuple) else (row.recipe,))
    ]
    data_free = {qjax.HQQ, qjax.LoftQ, qjax.LPLR}  # rows of test_all_methods.py
    assert {type(step) for step in steps} | data_free == set(METHODS)


@rows
def test_methods_are_hashable_and_print_their_fields(row):
    assert hash(row.method) == hash(replace(row.method))
    assert type(row.method).__name__ in repr(row.method)
