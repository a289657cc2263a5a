"""Mixed precision: what is measured, what it costs, and what is chosen."""

import re
import weakref
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.allocate import MixedPrecision, allocate
from qjax.core.formats import Codebook, Int, group
from qjax.core.lazy import LazyLeaf
from qjax.core.qtensor import is_quantized
from qjax.core.ranges import MinMaxRange
from qjax.io.huggingface import load_weights
from qjax.methods import EETQ, GPTQ, RTN
from qjax.quantize import quantize, quantize_with_report
from qjax.recipes import allocated, steps_of
from qjax.trace.apply import apply
from qjax.trace.paths import flatten_with_paths

D, H, V = 48, 64, 20
RNG = np.random.default_rng(0)
BATCHES = [(jnp.asarray(RNG.integers(0, V, (2, n)), jnp.int32),) for n in (6, 6, 6)]
SMALL = (RTN(weights=Int(3, group(32))), RTN(weights=Int(8, group(32))))


def matrix(*shape, scale=1.0):
    return jnp.asarray(RNG.normal(0, scale / np.sqrt(shape[-2]), shape), jnp.float32)


PARAMS = {
    "embed": matrix(V, D, scale=4.0),
    "layers": {"up": matrix(3, D, H), "down": matrix(3, H, D)},
    "head": matrix(D, V),
}


def scanned(params, tokens):
    def body(x, layer):
        return x + jnp.tanh(x @ layer["up"]) @ layer["down"], None

    x, _ = jax.lax.scan(body, params["embed"][tokens], params["layers"])
    return x @ params["head"]


def unrolled(params, tokens):
    x = params["embed"][tokens]
    for layer in params["layers"]:
        x = x + jnp.tanh(x @ layer["up"]) @ layer["down"]
    return x @ params["head"]


UNROLLED = {
    **PARAMS,
    "layers": [jax.tree.map(lambda x, i=i: x[i], PARAMS["layers"]) for i in range(3)],
}


def spread(report):
    return np.array([row.errors for row in report.rows])


@pytest.mark.parametrize("sensitivity", ["weights", "hessian", "kl"])
def test_scanned_and_unrolled_models_are_measured_alike(sensitivity):
    step = MixedPrecision(SMALL, target_bits=6, sensitivity=sensitivity)
    _, stacked = allocate(scanned, PARAMS, BATCHES, step)
    _, flat = allocate(unrolled, UNROLLED, BATCHES, step)
    by_name = {row.name: row for row in flat.rows}
    assert len(by_name) == 7
    for row in stacked.rows:
        other = by_name[row.name]
        np.testing.assert_allclose(row.errors, other.errors, rtol=2e-4, atol=1e-9)
        assert (row.nbytes, row.choice) == (other.nbytes, other.choice)


def quantized_alone(method, name):
    return quantize(
        unrolled, UNROLLED, replace(method, targets=name), BATCHES, progress=False
    )


def test_hessian_is_the_output_error_of_the_tokens():
    step = MixedPrecision(SMALL, target_bits=6, targets=("layers/1", "head"))
    _, report = allocate(unrolled, UNROLLED, BATCHES, step)

    def inputs(tokens):  # of layers/1/down and of head, in float64
        x = np.asarray(PARAMS["embed"], np.float64)[tokens]
        for i, layer in enumerate(UNROLLED["layers"]):
            up, down = (np.asarray(layer[n], np.float64) for n in ("up", "down"))
            inside = np.tanh(x @ up)
            if i == 1:
                seen = inside
            x = x + inside @ down
        return {"layers/1/down": seen, "head": x}

    for name, w in {"layers/1/down": UNROLLED["layers"][1]["down"],
                    "head": PARAMS["head"]}.items():  # fmt: skip
        row = next(row for row in report.rows if row.name == name)
        for method, found in zip(SMALL, row.errors):
            leaf = dict(flatten_with_paths(quantized_alone(method, name)))[name]
            delta = np.asarray(w, np.float64) - np.asarray(leaf.dequantize())
            xs = [inputs(np.asarray(b[0]))[name] for b in BATCHES]
            exact = sum(np.sum(np.square(x @ delta)) for x in xs)
            assert found == pytest.approx(exact, rel=1e-3)


def test_kl_is_that_of_the_model_with_one_site_quantized():
    step = MixedPrecision(SMALL, target_bits=6, sensitivity="kl")
    _, report = allocate(unrolled, UNROLLED, BATCHES, step)
    for row in report.rows[2:4]:
        qparams = quantized_alone(SMALL[0], row.name)
        total = count = 0
        for (tokens,) in BATCHES:
            p, q = (
                np.asarray(jax.nn.log_softmax(g(params, tokens)), np.float64)
                for g, params in ((unrolled, UNROLLED), (apply(unrolled), qparams))
            )
            total += np.sum(np.exp(p) * (p - q))
            count += tokens.size
        assert row.errors[0] == pytest.approx(total / count, rel=2e-3)


def test_kl_reads_as_many_tokens_as_asked_for():
    step = MixedPrecision(SMALL, target_bits=6, sensitivity="kl", tokens=5)
    _, few = allocate(unrolled, UNROLLED, BATCHES, step)
    _, first = allocate(unrolled, UNROLLED, BATCHES[:1], replace(step, tokens=4096))
    np.testing.assert_allclose(spread(few), spread(first), rtol=1e-6)


def test_choice_is_the_best_of_all():
    candidates = (*SMALL, RTN(weights=Int(4, group(16))))
    tables = [bytes_of(candidate) for candidate in candidates]
    for bits in (4.4, 5.5, 7.3):
        step = MixedPrecision(candidates, target_bits=bits, sensitivity="weights")
        steps, report = allocate(unrolled, UNROLLED, BATCHES, step)
        assert report.bits_per_weight <= bits
        errors = spread(report)
        sizes = np.array([[table[row.name] for table in tables] for row in report.rows])
        best = min(
            errors[np.arange(7), list(pick)].sum()
            for pick in product(range(3), repeat=7)
            if sizes[np.arange(7), list(pick)].sum() <= report.budget
        )
        assert report.error == pytest.approx(best, rel=1e-9)
        assert sum(len(each.targets) for each in steps) == 7


@cache
def bytes_of(method):
    """Bytes of every site when all have this method, from a quantized tree."""
    method = replace(method, targets=("layers", "head"))
    qparams = quantize(unrolled, UNROLLED, method, BATCHES, progress=False)
    return {n: x.nbytes for n, x in flatten_with_paths(qparams) if is_quantized(x)}


@pytest.mark.parametrize(
    "candidates",
    [
        (
            GPTQ("W4A16_ASYM", act_order="dynamic"),
            RTN("FP8", calibrator=MinMaxRange()),
        ),
        (RTN(weights=Codebook("nf4", group(32), double_quant=4)), EETQ()),
    ],
)
def test_bytes_are_those_of_the_quantized_tree(candidates):
    params = {"a": matrix(3, D, H), "b": matrix(H, D)}
    batches = [(matrix(3, 5, D),)]

    def f(params, x):
        return jnp.tanh(jnp.einsum("emk,ekn->mn", x, params["a"])) @ params["b"]

    step = MixedPrecision(candidates, target_bits=8.5, sensitivity="weights")
    steps, report = allocate(f, params, batches, step)
    qparams = quantize(f, params, steps, batches, progress=False)
    leaves = [x for _, x in flatten_with_paths(qparams) if is_quantized(x)]
    assert len(leaves) == 2
    assert sum(leaf.nbytes for leaf in leaves) == report.nbytes <= report.budget


def test_a_site_may_stay_in_float():
    step = MixedPrecision((None, SMALL[0]), target_bits=12, sensitivity="kl")
    steps, report = allocate(unrolled, UNROLLED, BATCHES, step)
    kept = {row.name for row in report.rows if row.candidate == "float"}
    qparams = quantize(unrolled, UNROLLED, steps, BATCHES, progress=False)
    leaves = dict(flatten_with_paths(qparams))
    assert 0 < len(kept) < 7
    assert {n for n in by_names(report) if not is_quantized(leaves[n])} == kept
    assert all(row.errors[0] == 0 and row.nbytes > 0 for row in report.rows)


def by_names(report):
    return [row.name for row in report.rows]


def test_more_bits_go_where_they_help():
    params = jax.tree.map(lambda x: x, UNROLLED)
    params["layers"][2]["down"] = params["layers"][2]["down"] * 20
    step = MixedPrecision(SMALL, target_bits=5.8, targets=("layers/*/down",))
    _, report = allocate(unrolled, params, BATCHES, step)
    chosen = {row.name: row.choice for row in report.rows}
    assert chosen["layers/2/down"] == 1
    assert sum(chosen.values()) == 1


def test_mask_leaves_padding_out():
    padded = [
        (jnp.concatenate([t, jnp.full((2, 5), 7, t.dtype)], axis=1),)
        for (t,) in BATCHES
    ]

    def mask_fn(tokens):
        return np.arange(tokens.shape[1])[None] < tokens.shape[1] - 5 + 0 * tokens

    for sensitivity in ("hessian", "kl"):
        step = MixedPrecision(SMALL, target_bits=6, sensitivity=sensitivity)
        _, plain = allocate(unrolled, UNROLLED, BATCHES, step)
        _, masked = allocate(unrolled, UNROLLED, padded, step, mask_fn=mask_fn)
        np.testing.assert_allclose(spread(masked), spread(plain), rtol=1e-3)


def test_steps_take_the_place_of_the_allocation():
    recipe = (
        RTN("W8A16", targets="head"),
        MixedPrecision(SMALL, target_bytes=12_000, targets="layers"),
    )
    steps, reports = allocated(steps_of(recipe), unrolled, UNROLLED, BATCHES[:1])
    assert len(reports) == 1 and reports[0].nbytes <= 12_000
    assert steps[-1] == recipe[0]
    assert {n for s in steps[:-1] for n in s.targets} == set(by_names(reports[0]))
    assert steps_of(steps) == steps


def test_lazy_leaves_are_read_one_at_a_time():
    alive, most = [], 0

    def lazy(x):
        def read():
            nonlocal most
            alive[:] = [ref for ref in alive if ref() is not None]
            value = x + 0
            alive.append(weakref.ref(value))
            most = max(most, len(alive))
            return value

        return LazyLeaf(x.shape, x.dtype, read)

    params = jax.tree.map(lazy, UNROLLED)
    step = MixedPrecision(SMALL, target_bits=6, sensitivity="weights")
    _, report = allocate(unrolled, params, BATCHES, step)
    _, loaded = allocate(unrolled, UNROLLED, BATCHES, step)
    assert report == loaded
    assert most <= 2


def test_report_reads_as_a_table_and_as_json():
    step = MixedPrecision(SMALL, target_bits=6, sensitivity="weights")
    _, report = allocate(unrolled, UNROLLED, BATCHES, step)
    assert report.table().row_count == 7
    line = report.lines()[0]
    assert line["kind"] == "allocation" and line["name"] == "layers/0/up"
    assert set(line["errors"]) == {"RTN int3 g32", "RTN int8 g32"}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "target_bits .* or target_bytes .* one of them"),
        ({"target_bits": 4, "target_bytes": 9}, "one of them"),
        ({"target_bits": -1}, "target_bits must be above 0"),
        ({"target_bits": 4, "sensitivity": "trace"}, "sensitivity must be one of"),
        ({"target_bits": 4, "tokens": 0}, "MixedPrecision.tokens"),
        ({"target_bits": 4, "candidates": (EETQ(),)}, "two different quantizers"),
        (
            {"target_bits": 4, "candidates": (EETQ(), RTN("W4A16", targets="head"))},
            "candidates name no sites",
        ),
    ],
)
def test_bad_fields(fields, said):
    with pytest.raises(ValueError, match=said):
        MixedPrecision(**fields)


def test_what_cannot_be_allocated():
    step = MixedPrecision(SMALL, target_bits=3)
    with pytest.raises(ValueError, match=r"target_bits 3 is too small: .* 4\.350 bits"):
        allocate(unrolled, UNROLLED, BATCHES, step)
    with pytest.raises(ValueError, match="needs calibration data"):
        allocate(unrolled, UNROLLED, None, step, example=BATCHES[0])
    with pytest.raises(TypeError, match="codes no weights"):
        MixedPrecision((EETQ(), MixedPrecision(target_bits=4)), target_bits=4)
    two = replace(step, sensitivity="kl", target_bits=6)
    with pytest.raises(ValueError, match="has 2 outputs"):
        allocate(lambda p, x: (unrolled(p, x), x), UNROLLED, BATCHES, two)


BUNDLED = Path(qjax.__file__).parent / "models/tiny_llama"
BY_HAND = (
    RTN("W8A16", targets=("layers/0", "layers/7")),
    RTN("W4A16", targets="layers/*/mlp"),
    RTN("FP8_DYNAMIC", targets="layers/*/attn", ignore="layers/3/attn/v_proj"),
    RTN("NF4", targets="layers/3/attn/v_proj"),
)


def by_hand(name):
    """The format that the rules above give a leaf's name."""
    if not re.match(r"layers/\d+/(attn|mlp)/\w+_proj", name):
        return None
    if name.startswith(("layers/0/", "layers/7/")):
        return "int8 g128"
    if "/mlp/" in name:
        return "int4 g128"
    return "nf4 g64" if name == "layers/3/attn/v_proj/kernel" else "fp8 e4m3 channel"


@pytest.mark.parametrize("scan_layers", [False, True])
def test_any_rule_per_site_on_the_bundled_model(scan_layers):
    f, params, _ = load_weights(BUNDLED, scan_layers=scan_layers)
    tokens = jnp.arange(16)[None]
    qparams, report = quantize_with_report(
        f, params, BY_HAND, example=(tokens,), progress=False
    )
    formats = {name: row.format for row in report for name in row.names}
    assert len(formats) == 56
    assert formats == {name: by_hand(name) for name in formats}
    leaves = dict(flatten_with_paths(qparams))
    kept = {n for n, x in leaves.items() if not is_quantized(x)}
    assert {"embed/embedding", "norm/scale"} <= kept
    assert all(n.endswith(("embedding", "scale")) for n in kept)
    near, exact = jax.jit(apply(f))(qparams, tokens), f(params, tokens)
    drift = jnp.sqrt(jnp.mean(jnp.square(near - exact)) / jnp.mean(jnp.square(exact)))
    assert float(drift) < 0.2
