"""The choice between XLA and the kernels, and that both mean the same."""

from dataclasses import replace
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

import qjax
from qjax.core.coded import encode
from qjax.core.formats import (
    MX,
    NVFP4,
    Additive,
    Codebook,
    Float,
    Int,
    block,
    channel,
    group,
    tensor,
    token,
)
from qjax.core.layout import Layout
from qjax.core.qtensor import Activation, QTensor, SiteActs, Sparse
from qjax.io import treespec
from qjax.ops import Target, matmul
from qjax.ops.elements import elements_choice
from qjax.ops.kernels import choices
from qjax.results import read
from qjax_kernels.compat import interpret_params
from qjax_kernels.element_outlier import Elements
from qjax_kernels.element_outlier.pallas_tpu import MOST_SLOTS, element_outlier

K, N, M = 256, 128, 8
TPU = Target("tpu", "v5e")
DYNAMIC = Activation(Int(8, token()))


def quantized(format, activation=None, K=K, N=N):
    acts = () if activation is None else (SiteActs(activation=activation),)
    w = jax.random.normal(jax.random.key(0), (K, N)) + 0.1
    return QTensor.of(encode(w, format), Layout("kn", (K, N)), jnp.bfloat16, acts)


@pytest.fixture
def simulated():
    pltpu.reset_tpu_interpret_mode_state()
    with pltpu.force_tpu_interpret_mode(interpret_params()):
        yield


@pytest.mark.parametrize(
    ("format", "activation"),
    [
        (Int(4, group(64), symmetric=False), None),
        (Int(3, group(64), symmetric=False), None),
        (Int(4, channel(), zero="float"), None),
        (Int(4, group(64), scale_rule="signed"), DYNAMIC),
        (Int(8, group(64), symmetric=False), DYNAMIC),
    ],
    ids=lambda part: "none" if part is None else getattr(part, "name", "dynamic"),
)
def test_kernels_agree_with_the_values(format, activation, simulated):
    q = quantized(format, activation)
    x = jax.random.normal(jax.random.key(1), (M, K), jnp.bfloat16)

    def run(x, implementation, target):
        return matmul(
            x, q, implementation=implementation, target=target, dtype=jnp.float32
        )

    y, pull = jax.vjp(lambda x: run(x, "pallas", TPU), x)
    expected, pull_xla = jax.vjp(lambda x: run(x, "xla", Target("cpu")), x)
    # XLA's form rounds weights to bfloat16, the kernel's does not.
    size = np.abs(np.asarray(x, np.float64)) @ np.abs(q.core(jnp.float32))
    assert (np.abs(y - expected) <= 2.0**-8 * size).all()
    exact = np.asarray(x, np.float64) @ np.asarray(q.core(jnp.float32), np.float64)
    if activation is None:
        assert (np.abs(y - exact) <= 2.0**-15 * size).all()
    seed = jnp.ones_like(y)
    np.testing.assert_array_equal(pull(seed)[0], pull_xla(seed)[0])


@pytest.mark.parametrize(
    ("format", "activation"),
    [
        (Float("e4m3", block(128, 128)), None),
        (Float("e4m3"), Activation(Float("e4m3", token()))),
        (MX("fp4"), None),
        (NVFP4(), Activation(NVFP4())),
        (Codebook("nf4", double_quant=256), None),
        (Codebook(None, channel(), bits=3), None),
    ],
    ids=lambda part: "none" if part is None else getattr(part, "name", "coded"),
)
def test_kernels_of_levels_agree_with_the_values(format, activation, simulated):
    q = quantized(format, activation)
    x = jax.random.normal(jax.random.key(1), (M, K), jnp.bfloat16)

    def run(implementation, target):
        return matmul(
            x, q, implementation=implementation, target=target, dtype=jnp.float32
        )

    y, expected = run("pallas", TPU), run("xla", Target("cpu"))
    size = np.abs(np.asarray(x, np.float64)) @ np.abs(q.core(jnp.float32))
    # XLA's form rounds weights to bfloat16, the kernel levels.
    assert (np.abs(y - expected) <= 2.0**-7 * size).all()


@pytest.mark.parametrize(
    ("format", "activation"),
    [
        (Int(4, group(64), symmetric=False), None),
        (Int(8, group(64), zero="float"), DYNAMIC),
        (Codebook("nf4", double_quant=256), None),
    ],
    ids=lambda part: "none" if part is None else getattr(part, "name", "dynamic"),
)
def test_gradients_run_on_a_kernel_too(format, activation, simulated):
    q = quantized(format, activation)
    x = jax.random.normal(jax.random.key(1), (M, K), jnp.bfloat16)

    def gradient(target):
        def run(x):
            return matmul(x, q, target=target)

        y, pull = jax.vjp(run, x)
        seed = jax.random.normal(jax.random.key(2), y.shape, jnp.bfloat16)
        return jax.jit(pull), seed

    pull, seed = gradient(TPU)
    (dx,) = pull(seed)
    assert "_backward" in str(jax.make_jaxpr(pull)(seed))
    w, dy = (np.asarray(v, np.float64) for v in (q.core(jnp.float32), seed))
    terms = np.abs(dy) @ np.abs(w).T
    # Levels or weights, weights, and the result are rounded to bfloat16.
    error = np.abs(np.asarray(dx, np.float64) - dy @ w.T)
    assert (error <= 2.0**-8 * (terms + np.abs(dy @ w.T))).all()
    (expected,) = gradient(Target("cpu"))[0](seed)
    assert (np.abs(dx - expected) <= 2.0**-7 * terms).all()


@pytest.mark.parametrize(
    "format",
    [
        Int(4, group(64), symmetric=False),
        Int(2, channel(), zero="float"),
        Int(8, group(128)),
    ],
    ids=lambda format: format.name,
)
def test_scales_on_sums_agree_with_the_values(format):
    """The form that XLA gets on a TPU, run where the tests are."""
    q = quantized(format)
    target = Target("tpu", None)
    x = jax.random.normal(jax.random.key(1), (M, K))
    (choice,) = choices(q, 0, x, "auto", target)
    assert choice.name == "xla, scales on sums"
    exact = np.asarray(x, np.float64) @ np.asarray(q.core(jnp.float32), np.float64)
    y = matmul(x, q, target=target)
    np.testing.assert_allclose(y, exact, rtol=1e-4, atol=1e-3)
    other = jax.grad(lambda x: matmul(x, q, target=Target("cpu")).sum())(x)
    own = jax.grad(lambda x: matmul(x, q, target=target).sum())(x)
    np.testing.assert_allclose(own, other, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    "format",
    [Int(4, group(64)), Int(2, group(32), symmetric=False), Int(8, group(128))],
    ids=lambda format: format.name,
)
def test_scales_on_sums_of_codes_agree_with_the_scan(format):
    """int8 tokens on a TPU without a kernel: both forms have the same integers."""
    q = quantized(format, DYNAMIC)
    target = Target("tpu", None, 8)
    x = jax.random.normal(jax.random.key(1), (M, K))
    (choice,) = choices(q, 0, x, "auto", target)
    assert choice.name == "xla, scales on sums"
    y, pull = jax.vjp(lambda x: matmul(x, q, target=target), x)
    expected, other = jax.vjp(lambda x: matmul(x, q, target=Target("cpu")), x)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(pull(y)[0], other(y)[0])
    whole = quantized(Int(8, channel()), DYNAMIC)
    assert choices(whole, 0, x, "auto", target)[0].name == "xla"


REFUSALS = [
    (Int(5, group(64)), None, TPU, "no kernel for int5 g64"),
    (Int(3, group(64)), DYNAMIC, TPU, "no kernel for int3 g64"),
    (Int(3, group(16)), None, TPU, "scales for whole 32 inputs, not 16"),
    (Codebook(None, bits=5), None, TPU, "no kernel for codebook5"),
    (Additive(), None, TPU, "no kernel for vectors 8 bits x8"),
    (MX("fp6"), None, TPU, "no kernel for mxfp6"),
    (Float("e4m3b11"), None, Target("tpu", "v7x"), "no type of v7x"),
    (Int(4, block(64, 64)), None, TPU, "scales for single outputs"),
    (Int(4, group(64)), None, Target("cpu"), "there is no kernel for cpu"),
    (Int(4, group(64)), None, Target("tpu", None), "this generation of TPU"),
    (Int(4, group(64)), None, Target("tpu", "v6e", 4), "use shard_map"),
    (Int(4, group(64)), Activation(Int(8, tensor())), TPU, "int8 tokens, not int8"),
    (Int(8), DYNAMIC, TPU, "in one fusion"),
]


@pytest.mark.parametrize(("format", "activation", "target", "why"), REFUSALS)
def test_a_refusal_says_why_and_is_an_error_if_a_kernel_was_asked_for(
    format, activation, target, why
):
    q = quantized(format, activation)
    x = jnp.ones((M, K), jnp.bfloat16)
    (choice,) = choices(q, 0, x, "auto", target)
    assert choice.implementation == "xla" and why in choice.refused
    with pytest.raises(ValueError, match="but") as error:
        matmul(x, q, implementation="pallas", target=target)
    assert why in str(error.value)


def test_float32_activations_and_huge_tokens_are_refused():
    q = quantized(Int(4, group(64)))
    (choice,) = choices(q, 0, jnp.ones((M, K)), "auto", TPU)
    assert "contracts bfloat16; the activation is float32" in choice.refused


def test_outlier_weights_run_on_a_kernel_once_they_are_in_tiles(simulated):
    draw = np.random.default_rng(0)
    values = jnp.asarray(draw.normal(size=50), jnp.bfloat16)
    rows, cols = (jnp.asarray(draw.integers(0, size, 50)) for size in (K, N))
    q = replace(quantized(Int(4, group(64))), sparse=Sparse(values, rows, cols))
    x = jax.random.normal(jax.random.key(1), (M, K), jnp.bfloat16)
    choice = elements_choice(q, x, "auto", TPU)
    assert choice is not None and "qjax.pack(qparams)" in choice.refused
    tiled = qjax.pack(q, TPU)
    chex.assert_trees_all_equal(qjax.unpack(tiled), q)
    with pytest.raises(TypeError, match=r"^leaf w/sparse is packed for hardware"):
        treespec.encode({"w": tiled})

    def run(leaf, target):
        return jax.vjp(lambda x: matmul(x, leaf, target=target, dtype=jnp.float32), x)

    y, pull = run(tiled, TPU)
    expected, pull_xla = run(q, Target("cpu"))
    size = np.abs(np.asarray(x, np.float64)) @ np.abs(q.matrix(jnp.float32))
    assert (np.abs(y - expected) <= 2.0**-8 * size).all()
    terms = np.abs(y) @ np.abs(q.matrix(jnp.float32)).T
    difference = np.asarray(pull(y)[0] - pull_xla(y)[0], np.float32)
    assert (np.abs(difference) <= 2.0**-8 * terms).all()
    program = str(jax.make_jaxpr(lambda x: matmul(x, tiled, target=TPU))(x))
    assert "elements_128" in program
    matrix = "xla, spread over a float matrix, no pallas: the outliers are not in tiles"
    for leaf, by in ((tiled, "pallas v5e;"), (q, matrix)):
        (found,) = qjax.explain(g, {"w": leaf}, x, target=TPU).weights
        assert f"outlier weights beside it by {by}" in found.runs


def test_a_tile_full_of_outliers_is_left_to_xla():
    """Of 128 x 128 weights in one tile, the kernel takes an eighth."""
    draw = np.random.default_rng(0)
    places = draw.permutation(128 * 128)[: MOST_SLOTS + 1]
    values = jnp.asarray(draw.normal(size=places.size), jnp.bfloat16)
    rows, cols = (jnp.asarray(part) for part in divmod(places, 128))
    plain = replace(quantized(Int(4, group(64))), sparse=Sparse(values, rows, cols))
    x = jax.random.normal(jax.random.key(1), (M, K), jnp.bfloat16)
    full = qjax.pack(plain, TPU)
    choice = elements_choice(full, x, "auto", TPU)
    why = f"holds up to {MOST_SLOTS + 128} outliers; the kernel takes {MOST_SLOTS}"
    assert choice is not None and choice.implementation == "xla"
    assert why in choice.refused
    (found,) = qjax.explain(g, {"w": full}, x, target=TPU).weights
    assert why in found.runs
    fewer = (part[:MOST_SLOTS] for part in (values, rows, cols))
    choice = elements_choice(
        qjax.pack(replace(plain, sparse=Sparse(*fewer)), TPU), x, "auto", TPU
    )
    assert choice is not None and choice.implementation == "pallas"
    with pytest.raises(ValueError, match=why):
        element_outlier(x, Elements(full.sparse.words, (K, N)), generation="v5e")


KINDS = {
    "w4a16_g128": (Int(4, group(128)), None),
    "w4a8_g128": (Int(4, group(128)), DYNAMIC),
    "w8a8": (Int(8), DYNAMIC),
}


def compared():
    """What `kernels/bench/peers.py` found: cycles by case and by form."""
    found = {}
    for record in read(Path(__file__).parents[2] / "kernels/bench/peers.jsonl"):
        generation, kind, M, form = record.label.split(maxsplit=3)
        cycles = record.metrics.get("thousand_cycles")
        case = generation, kind, int(M.removeprefix("M="))
        found.setdefault(case, {})[form] = cycles
    return {case: forms for case, forms in found.items() if "Pallas, ours" in forms}


@pytest.mark.parametrize("case", compared(), ids=lambda case: "-".join(map(str, case)))
def test_the_form_with_the_fewest_cycles_is_chosen(case):
    """Of the kernel and of XLA's two forms, by the committed counts.

    Where XLA's estimates overflow there are none to choose by.
    """
    (generation, kind, M), forms = case, compared()[case]
    format, activation = KINDS[kind]
    K, N = 4096, 14336
    leaf = jax.eval_shape(lambda: quantized(format, activation, K, N))
    x = jax.ShapeDtypeStruct((M, K), jnp.bfloat16)
    (choice,) = choices(leaf, 0, x, "auto", Target("tpu", generation))
    known = {form: n for form, n in forms.items() if form.startswith("XLA, qjax") and n}
    xla = min(known.values(), default=float("inf"))
    assert bool(choice.generation) == (forms["Pallas, ours"] < xla)
    if not choice.generation and "XLA, qjax, decoded" in known:
        assert known["XLA, qjax, sums" if choice.sums else "XLA, qjax, decoded"] == xla


def f(params, x):
    return jnp.tanh(x @ params["up"]) @ params["down"]


def test_explain_names_the_implementation_of_every_site():
    params = {"up": jnp.ones((64, 128)), "down": jnp.ones((128, 64))}
    params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
    x = jax.ShapeDtypeStruct((2, 64), jnp.bfloat16)
    recipe = (
        qjax.RTN(weights=Int(4, group(32)), targets="up"),
        qjax.RTN(weights=Int(5, group(32))),
    )
    q = qjax.quantize(f, params, recipe, example=(x,), progress=False)
    runs = {s.path: s.runs for s in qjax.explain(f, q, x, target=TPU).weights}
    assert runs["up"].endswith("; pallas v5e")
    assert runs["down"].endswith("; xla, no pallas: no kernel for int5 g32")
    here = {s.path: s.runs for s in qjax.explain(f, q, x).weights}
    assert here["up"].endswith("; xla, no pallas: there is no kernel for cpu")


def g(params, x):
    return x @ params["w"]


@pytest.mark.parametrize(
    ("target", "stored", "words"),
    [
        (TPU, Int(4, group(64)), "in int32; pallas v5e"),
        (Target("tpu", "v7x"), Int(4, group(64)), "in bfloat16; pallas v7x"),
        (Target("gpu"), Int(4, group(64)), "as floats; xla, narrow weights"),
        (Target("gpu"), Int(8), "in int32; xla"),
        (Target("tpu"), Int(4, group(64)), "in int32; xla, scales on sums"),
    ],
    ids=lambda value: getattr(value, "name", str(value).split(";")[0]),
)
def test_explain_says_in_what_coded_tokens_meet_weights(target, stored, words):
    q = qjax.pack({"w": quantized(stored, DYNAMIC)}, target)
    x = jax.ShapeDtypeStruct((M, K), jnp.bfloat16)
    (site,) = qjax.explain(g, q, x, target=target).weights
    assert f"x int8 channel dynamic {words}" in site.runs


@pytest.mark.parametrize(("M", "words"), [(64, "int32"), (65, "bfloat16")])
def test_explain_says_where_many_coded_tokens_meet_scaled_weights(M, words):
    target, x = Target("tpu", "v6e"), jax.ShapeDtypeStruct((M, K), jnp.bfloat16)
    q = {"w": quantized(Int(4, group(64)), DYNAMIC)}
    (site,) = qjax.explain(g, q, x, target=target).weights
    assert f"dynamic in {words}; pallas v6e" in site.runs


def test_apply_runs_the_kernel_or_says_why_not(simulated):
    params = {"up": jnp.ones((64, 128), jnp.bfloat16)}
    x = jax.random.normal(jax.random.key(0), (2, 64), jnp.bfloat16)
    q = {"up": quantized(Int(4, group(32)), K=64)}

    def run(params, x):
        return x @ params["up"]

    kernel = qjax.apply(run, implementation="pallas", target=TPU)
    assert "pallas_call" in str(jax.make_jaxpr(kernel)(q, x))
    np.testing.assert_allclose(
        np.asarray(kernel(q, x), np.float32),
        np.asarray(qjax.apply(run)(q, x), np.float32),
        atol=0.25,
    )
    with pytest.raises(ValueError, match="there is no kernel for cpu"):
        qjax.apply(run, implementation="pallas")(q, x)
    with pytest.raises(ValueError, match="implementation is 'triton'"):
        qjax.apply(run, implementation="triton")(q, x)
    assert params["up"].shape == q["up"].shape
