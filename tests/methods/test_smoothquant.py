"""SmoothQuant: the published scale, and a function that stays what it was."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qjax
from qjax.core.coded import encode
from qjax.core.formats import Int
from qjax.core.transforms import Diagonal
from qjax.io.huggingface import load_model
from qjax.methods import AWQ, RTN
from qjax.methods.base import Solution
from qjax.methods.smoothquant import SmoothQuant, feature_sizes, smoothing_scale
from qjax.models import architecture, functional
from qjax.models.fields import Fields
from qjax.quantize import quantize_with_report
from qjax.trace.apply import apply

# torch's own, when transformers first imports its compiler.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")

TINY = Path(qjax.__file__).parent / "models/tiny_llama"
GOLDEN = Path(__file__).parents[1] / "golden/llmcompressor.npz"
RNG = np.random.default_rng(0)


class Keep:
    """Stores the weights as they are: a low-rank part of full rank."""

    random, activation, full_precision, shared = False, None, False, False
    format, statistics = Int(8), {}

    def __init__(self, targets=None):
        self.targets, self.ignore = targets, ()

    def solve_site(self, w, stats, key=None):
        zero = encode(jnp.zeros_like(w), self.format)
        return Solution((zero,), left=w, right=jnp.eye(w.shape[1], dtype=w.dtype))


def transformed(f, params, batches, *steps, targets=None):
    recipe = (*steps, Keep(targets))
    return quantize_with_report(f, params, recipe, batches, progress=False)


def difference(f, params, q, inputs):
    exact = np.asarray(jax.jit(f)(params, *inputs), np.float64)
    found = jax.jit(apply(f))(q, *inputs)
    return np.linalg.norm(found - exact) / np.linalg.norm(exact)


@pytest.mark.parametrize("strength", [0.0, 0.5, 0.8, 1])
def test_scale_is_that_of_the_reference_implementation(strength):
    x = np.abs(RNG.normal(size=20)).astype(np.float32)
    ws = [RNG.normal(size=(20, n)).astype(np.float32) for n in (8, 5)]
    x[3], ws[0][4], ws[1][4] = 0, 0, 0
    sizes = np.concatenate([np.abs(w) for w in ws], 1).astype(np.float64).max(1)
    sizes = np.maximum(sizes, 1e-5)
    exact = np.maximum(x.astype(np.float64) ** strength / sizes ** (1 - strength), 1e-5)
    sizes = feature_sizes([jnp.asarray(w) for w in ws], span=False)
    found = smoothing_scale(jnp.asarray(x), sizes, float(strength))
    np.testing.assert_allclose(found, exact, rtol=1e-5)


@pytest.fixture(scope="module")
def tiny():
    f, params, *_ = load_model(TINY)
    return f, jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)


READERS = {"attn_norm": ("attn", "qkv"), "mlp_norm": ("mlp", ("gate", "up"))}


@pytest.mark.parametrize("strength", [0.5, 0.8])
def test_span_is_that_of_llm_compressor(tiny, strength):
    params = tiny[1]["layers"]
    with np.load(GOLDEN) as golden:
        ranges = golden[f"smoothquant/tiny/{strength}/range"]
        scales = golden[f"smoothquant/tiny/{strength}/scales"]
    for layer in range(8):
        for i, (module, readers) in enumerate(READERS.values()):
            held = params[str(layer)][module]
            ws = [held[f"{name}_proj"]["kernel"] for name in readers]
            x = jnp.asarray(ranges[2 * layer + i])
            found = smoothing_scale(x, feature_sizes(ws, span=True), strength)
            np.testing.assert_allclose(found, scales[2 * layer + i], rtol=1e-5)


def test_folded_scales_are_those_of_llm_compressor(tiny):
    f, params = tiny
    with np.load(GOLDEN) as golden:
        rows = jnp.asarray(golden["tokens"], jnp.int32)
        scales = golden["smoothquant/tiny/0.5/scales"]
    batches = [(rows[:8],), (rows[8:],)]
    step = SmoothQuant(0.5, span=True)
    q, _ = transformed(f, params, batches, step, targets="layers/0/*")
    for found, name in zip(scales, READERS):
        before, after = (p["layers"]["0"][name]["scale"] for p in (params, q))
        np.testing.assert_allclose(before / after, found, rtol=1e-4)


SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
GPT2 = {"vocab_size": 61, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 32}
MODELS = {
    "llama": {**SMALL, "num_key_value_heads": 2},
    "qwen3": {**SMALL, "num_key_value_heads": 2, "head_dim": 8},
    "gemma3_text": {**SMALL, "num_key_value_heads": 2, "head_dim": 8},
    "gpt2": GPT2,
    "bert": SMALL,
}
TOKENS = jnp.asarray(np.random.default_rng(1).integers(0, 61, (3, 12)), jnp.int32)


def model(kind):
    """A random model whose gains and biases are not those of its first day."""
    made = architecture(kind)
    config = made.from_fields(Fields(MODELS[kind]))
    f, params = functional(made.build(config, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(2)

    def moved(leaf):
        wide = np.exp(0.8 * rng.normal(size=leaf.shape))
        return jnp.asarray((leaf + 0.1 * rng.normal(size=leaf.shape)) * wide)

    return f, jax.tree.map(lambda x: moved(x).astype(jnp.float32), params)


@pytest.mark.parametrize("kind", MODELS)
def test_the_function_stays(kind):
    f, params = model(kind)
    q, report = transformed(f, params, [(TOKENS,)], SmoothQuant())
    assert difference(f, params, q, (TOKENS,)) < 1e-5
    into = {row.names[0]: row.into for row in report.transforms}
    taken = [name for name, leaf in into.items() if leaf]
    # The norms of BERT come after the sums, which read them too.
    assert len(taken) == (0 if kind == "bert" else 2)
    assert all("norm" in into[name] for name in taken)
    for row in report.transforms:
        assert bool(row.remark) != bool(row.into)


def test_scales_of_gated_layers_are_folded_too():
    f, params = model("gemma3_text")
    q, report = transformed(f, params, [(TOKENS,)], AWQ(n_grid=4))
    assert difference(f, params, q, (TOKENS,)) < 1e-5
    into = {row.names[0].split("/")[3]: row.into for row in report.transforms}
    assert "up_proj" in into["down_proj"]
    gains = (p["layers"]["0"]["mlp_norm"]["scale"] for p in (params, q))
    assert not np.allclose(*gains)


def test_what_cannot_be_folded_stays_on_the_activation():
    f, params = model("bert")
    q, report = transformed(f, params, [(TOKENS,)], SmoothQuant(online=True))
    assert difference(f, params, q, (TOKENS,)) < 1e-5
    into = {row.names[0].split("/")[3]: row.into for row in report.transforms}
    assert into["q_proj"] == into["up_proj"] == "the activation"
    assert "v_proj" in into["o_proj"]
    up = q["layers"]["0"]["mlp"]["up_proj"]["kernel"]
    assert isinstance(up.acts[0].t_in, Diagonal)


def scanned(params, x):
    def layer(x, p):
        return jnp.tanh((x * p["norm"]) @ p["up"]) @ p["down"], None

    return jax.lax.scan(layer, x, params["layers"])[0]


def unrolled(params, x):
    for p in params["layers"]:
        x = jnp.tanh((x * p["norm"]) @ p["up"]) @ p["down"]
    return x


def stack():
    rng = np.random.default_rng(3)
    shapes = {"norm": (2, 16), "up": (2, 16, 24), "down": (2, 24, 16)}
    return {n: jnp.asarray(rng.normal(size=s), jnp.float32) for n, s in shapes.items()}


WIDE = np.exp(np.random.default_rng(4).normal(size=16))
X = jnp.asarray(np.random.default_rng(1).normal(size=(40, 16)) * WIDE, jnp.float32)


def test_layers_of_a_scan_are_smoothed_as_if_they_stood_apart():
    whole = stack()
    apart = [jax.tree.map(lambda w, i=i: w[i], whole) for i in range(2)]
    a, rows = transformed(scanned, {"layers": whole}, [(X,)], SmoothQuant())
    b, same = transformed(unrolled, {"layers": apart}, [(X,)], SmoothQuant())
    gains = jnp.stack([layer["norm"] for layer in b["layers"]])
    np.testing.assert_array_equal(a["layers"]["norm"], gains)
    taken = [[bool(row.into) for row in r.transforms] for r in (rows, same)]
    assert taken == [[True, False, True, False]] * 2
    assert difference(scanned, {"layers": whole}, a, (X,)) < 1e-5


def smoothed_floats(q):
    """Float parameters of the smoothed model."""
    return jax.tree.map(
        lambda x: x.dequantize() if qjax.is_quantized(x) else x,
        q,
        is_leaf=qjax.is_quantized,
    )


def test_a_second_transform_sees_the_smoothed_input():
    params = {"layers": [jax.tree.map(lambda w: w[0], stack())]}
    then = (AWQ(n_grid=8), RTN(weights=Int(3, symmetric=False)))
    first, _ = transformed(unrolled, params, [(X,)], SmoothQuant())
    floats = smoothed_floats(first)
    alone = quantize_with_report(unrolled, floats, then, [(X,)], progress=False)[1]
    both = (SmoothQuant(), *then)
    q, report = quantize_with_report(unrolled, params, both, [(X,)], progress=False)
    found = [row for row in report.transforms if row.method == "AWQ"]
    assert [row.names for row in found] == [row.names for row in alone.transforms]
    assert found[0].into == "layers/0/norm"
    np.testing.assert_allclose(found[0].error, alone.transforms[0].error, rtol=1e-3)
    assert found[0].notes == alone.transforms[0].notes
    kept, _ = transformed(unrolled, params, [(X,)], SmoothQuant(), AWQ(n_grid=8))
    assert difference(unrolled, params, kept, (X,)) < 1e-5
    np.testing.assert_allclose(
        kept["layers"][0]["norm"], q["layers"][0]["norm"], rtol=1e-5
    )


@pytest.mark.parametrize("value", [-0.1, 1.5, "half"])
def test_bad_strengths_are_named(value):
    with pytest.raises((TypeError, ValueError), match="smoothing_strength"):
        SmoothQuant(value)
