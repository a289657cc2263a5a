"""AWQ: the best point of the grid, against plain loops and llm-compressor's losses."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qjax
from qjax.core.coded import encode
from qjax.core.formats import Int, group
from qjax.core.transforms import Diagonal
from qjax.io.huggingface import load_model
from qjax.methods.awq import AWQ, clip_limits, grid_points
from qjax.methods.base import Group, Solution
from qjax.methods.rtn import RTN
from qjax.models import architecture, functional
from qjax.models.fields import Fields
from qjax.quantize import quantize_with_report
from qjax.trace.apply import apply

# torch's own, when transformers first imports its compiler.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")

TINY = Path(qjax.__file__).parent / "models/tiny_llama"
GOLDEN = Path(__file__).parents[1] / "golden/llmcompressor.npz"
RNG = np.random.default_rng(0)
D, H, M, SIZE = 32, 48, 96, 16
FORMAT = Int(3, group(SIZE), symmetric=False)


class Keep:
    """Stores the weights as they are: a low-rank part of full rank."""

    targets, ignore, random, activation = None, (), False, None
    full_precision = shared = False
    format, statistics = FORMAT, {}

    def solve_site(self, w, stats, key=None):
        zero = encode(jnp.zeros_like(w), Int(8))
        return Solution((zero,), left=w, right=jnp.eye(w.shape[1], dtype=w.dtype))


def gated(params, x):
    mlp, h = params["layers"]["0"]["mlp"], x * params["norm"]
    h = jax.nn.silu(h @ mlp["gate"]["kernel"]) * (h @ mlp["up"]["kernel"])
    return h @ mlp["down"]["kernel"]


def small(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"gate": (D, H), "up": (D, H), "down": (H, D)}
    mlp = {
        name: {"kernel": jnp.asarray(rng.normal(size=shape) / 6, jnp.float32)}
        for name, shape in shapes.items()
    }
    norm = jnp.asarray(np.exp(1.2 * rng.normal(size=D)), jnp.float32)
    return {"layers": {"0": {"mlp": mlp}}, "norm": norm}


X = RNG.normal(size=(M, D)).astype(np.float32)


def run(f, params, *recipe, batches=((X,),)):
    return quantize_with_report(f, params, recipe, list(batches), progress=False)


def difference(f, params, q, *inputs):
    exact = np.asarray(jax.jit(f)(params, *inputs), np.float64)
    found = jax.jit(apply(f))(q, *inputs)
    return np.linalg.norm(found - exact) / np.linalg.norm(exact)


def rounded(w):
    """Asymmetric codes in groups of rows, zero in the range."""
    blocks = w.reshape(-1, SIZE, w.shape[1])
    low, high = (np.minimum(blocks.min(1), 0), np.maximum(blocks.max(1), 0))
    scale = ((high - low) / np.float32(7))[:, None]
    zero = np.round(np.clip(-low[:, None] / scale - 4, -4, 3))
    codes = np.clip(np.round(blocks / scale + zero), -4, 3)
    return ((codes - zero) * scale).reshape(w.shape)


def silu(x):
    return x / (1 + np.exp(-x))


def loop(params, grid):
    """Errors of every point `(ratio, duo)` for both mappings, in numpy."""
    mlp = params["layers"]["0"]["mlp"]
    gate, up, down = (np.asarray(mlp[n]["kernel"]) for n in ("gate", "up", "down"))
    h = X * np.asarray(params["norm"])
    inner = silu(h @ gate) * (h @ up)
    exact = inner @ down

    def scales(x, ws):
        size = np.abs(x).mean(0)
        weights = []
        for w in ws:
            blocks = np.abs(w).reshape(-1, SIZE, w.shape[1])
            share = blocks / (blocks.max(1, keepdims=True) + 1e-6)
            weights.append(share.reshape(w.shape))
        mean = np.concatenate(weights, 1).mean(1)
        for r, duo in grid:
            s = size**r / (mean ** (1 - r) + 1e-4) if duo else size**r
            s = np.maximum(s, 1e-4)
            yield s / np.sqrt(s.max() * s.min())

    def error(y):
        return np.square((y - exact).astype(np.float64)).sum()

    def coded(w, s):
        return rounded((w * s[:, None]).astype(np.float32)) / s[:, None]

    first = [
        error((silu(h @ coded(gate, s)) * (h @ coded(up, s))) @ down)
        for s in scales(h, [gate, up])
    ]
    second = [error(inner @ coded(down, s)) for s in scales(inner, [down])]
    return first, second


@pytest.mark.parametrize("duo", [False, True])
def test_the_best_ratio_is_that_of_a_plain_loop(duo):
    params = small()
    recipe = AWQ(duo_scaling=duo), RTN(weights=FORMAT)
    _, report = run(gated, params, *recipe)
    grid = list(zip(*grid_points(20, duo)))
    assert [len(row.names) for row in report.transforms] == [2, 1]
    for row, errors in zip(report.transforms, loop(params, grid)):
        best = int(np.argmin(errors))
        np.testing.assert_allclose(row.error, errors[best], rtol=2e-3)
        if not row.remark:
            at = grid.index((np.float32(row.notes["ratio"]), row.notes["duo"]))
            np.testing.assert_allclose(errors[at], errors[best], rtol=2e-3)


def test_a_format_is_short_for_rounding_to_it():
    down, both = "*down*", []
    for recipe in (
        (AWQ(weights=FORMAT, targets=down),),
        (AWQ(), RTN(weights=FORMAT, targets=down)),
    ):
        q, report = run(gated, small(), *recipe)
        both.append((apply(gated)(q, X), report.transforms))
    np.testing.assert_array_equal(both[0][0], both[1][0])
    assert both[0][1] == both[1][1]


@pytest.fixture(scope="module")
def tiny():
    f, params, *_ = load_model(TINY)
    return f, jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)


NORMS = {
    "q_proj": "input_layernorm",
    "gate_proj": "post_attention_layernorm",
    "down_proj": "mlp.up_proj",
}


@pytest.mark.parametrize("duo", [False, True, "both"])
def test_the_grid_is_that_of_llm_compressor(duo):
    with np.load(GOLDEN) as golden:
        grid = golden[f"awq/grid/{duo}"]
    np.testing.assert_allclose(np.stack(grid_points(20, duo), 1), grid, rtol=1e-6)


@pytest.mark.parametrize("duo", [False, True, "both"])
def test_losses_are_those_of_llm_compressor(tiny, duo):
    f, params = tiny
    with np.load(GOLDEN) as golden:
        rows = jnp.asarray(golden["tokens"], jnp.int32)
        names = golden[f"awq/tiny/{duo}/names"].tolist()
        losses, grid = golden[f"awq/tiny/{duo}/losses"], golden[f"awq/grid/{duo}"]
    recipe = (
        AWQ(duo_scaling=duo),
        RTN("W4A16_ASYM", targets="layers/0/*", ignore="*o_proj*"),
    )
    report = run(f, params, *recipe, batches=[(rows[:8],), (rows[8:],)])[1]
    for row in report.transforms:
        _, layer, _, linear, _ = row.names[0].split("/")
        if linear not in NORMS:
            continue  # the peer leaves grouped-query attention's output alone
        theirs = losses[names.index(f"model.layers.{layer}.{NORMS[linear]}")]
        ours = np.array([row.error_before, row.error]) / (rows.size * 256)
        np.testing.assert_allclose(ours, [theirs[0], theirs.min()], rtol=2e-3)
        ratio, used = grid[theirs.argmin()]
        found = (0, 0) if row.remark else (row.notes["ratio"], row.notes["duo"])
        np.testing.assert_allclose(found, (ratio, used), atol=1e-6)


def group_of(errors):
    """A group whose candidates have these errors, the plain one first."""
    w = jnp.ones((D, 4))
    stats = {"size": jnp.ones(D)}
    return Group(("a",), (w,), (FORMAT,), stats, lambda v: v, lambda s, m: errors)


def test_a_scale_that_does_not_help_is_rejected_and_reported():
    worse = AWQ(n_grid=4).transform(group_of(np.array([1.0, 1.1, 1.2, 1.0, 1.3])))
    assert worse.scale is None and worse.remark.startswith("rejected")
    assert (worse.error_before, worse.error) == (1.0, 1.0)
    broken = AWQ(n_grid=4).transform(group_of(np.array([1.0, *[np.nan] * 4])))
    assert broken.scale is None and broken.remark.startswith("rejected")
    better = AWQ(n_grid=4).transform(group_of(np.array([1.0, 1.1, 0.5, 0.7, 1.3])))
    assert better.scale is not None and better.error == 0.5


LLAMA = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
TOKENS = jnp.asarray(np.random.default_rng(1).integers(0, 61, (3, 12)), jnp.int32)


def attention(kind):
    """A layer of grouped-query attention; Qwen2 has biases there."""
    made = architecture(kind)
    model = made.build(made.from_fields(Fields(LLAMA)), rngs=nnx.Rngs(0))
    f, params = functional(model)
    rng = np.random.default_rng(2)
    return f, jax.tree.map(
        lambda x: (x + 0.3 * rng.normal(size=x.shape)).astype(jnp.float32), params
    )


def test_scales_of_shared_value_heads_are_tied():
    f, params = attention("qwen2")
    step = AWQ(n_grid=4, targets="*o_proj*")
    q, report = run(f, params, step, Keep(), batches=[(TOKENS,)])
    assert difference(f, params, q, TOKENS) < 1e-5
    row = next(r for r in report.transforms if "o_proj" in r.names[0])
    assert "v_proj/kernel" in row.into and row.error < row.error_before
    held = params["layers"]["0"]["attn"]["o_proj"]["kernel"]
    now = q["layers"]["0"]["attn"]["o_proj"]["kernel"].dequantize()
    scale = np.asarray(now / held).mean(1).reshape(2, 2, 8)
    # Two query heads read one value head.
    np.testing.assert_allclose(scale[:, 0], scale[:, 1], rtol=1e-4)
    assert np.ptp(scale) > 0.01


def through(params, x):
    """Nothing can take the scale: the input is the function's own."""
    return jnp.tanh(x @ params["a"]) @ params["b"]


def test_online_keeps_the_scale_on_the_activation():
    mlp = small()["layers"]["0"]["mlp"]
    params = {"a": mlp["up"]["kernel"], "b": mlp["down"]["kernel"]}
    x = X * np.exp(1.5 * RNG.normal(size=D)).astype(np.float32)
    left, report = run(through, params, AWQ(), Keep(), batches=[(x,)])
    assert all(row.remark.startswith("not folded") for row in report.transforms)
    assert left["a"].acts == () or left["a"].acts[0].t_in is None
    q, report = run(through, params, AWQ(online=True), Keep(), batches=[(x,)])
    assert difference(through, params, q, x) < 1e-5
    moved = [n for n in "ab" if isinstance(q[n].acts[0].t_in, Diagonal)]
    assert "a" in moved
    assert moved == [
        r.names[0] for r in report.transforms if r.into == "the activation"
    ]
    rounding = RTN(weights=FORMAT)
    plain, better = (
        difference(through, params, run(through, params, *r, batches=[(x,)])[0], x)
        for r in ((rounding,), (AWQ(online=True), rounding))
    )
    assert better < plain


def test_clipping_lowers_the_error():
    params = small()
    down = params["layers"]["0"]["mlp"]["down"]
    down["kernel"] = down["kernel"].at[3].mul(4)
    errors = []
    for clip in (False, True):
        recipe = AWQ(clip=clip), RTN(weights=FORMAT, targets="*down*")
        q, report = run(gated, params, *recipe)
        errors.append(difference(gated, params, q, X))
        sites = [site.error for site in report.sites]
        errors.append(np.linalg.norm(sites))
    assert errors[2] < errors[0] and errors[3] < errors[1]


def test_clipping_limits_are_those_of_a_plain_loop():
    w = RNG.standard_t(3, size=(D, 6)).astype(np.float32)
    x = RNG.normal(size=(64, D))
    found = clip_limits(
        jnp.asarray(w), jnp.asarray(x.T @ x, jnp.float32), FORMAT, 20, 0.5
    )
    for g in range(D // SIZE):
        rows = slice(g * SIZE, (g + 1) * SIZE)
        for n in range(6):
            top = np.abs(w[rows, n]).max()
            errors = [
                np.square(
                    x[:, rows] @ (w[rows, [n]] - rounded(cut(w[rows, [n]], limit)))
                )
                for limit in (top * np.float32(1 - i / 20) for i in range(10))
            ]
            errors = [e.sum() for e in errors]
            at = round((1 - float(found[g, n]) / top) * 20)
            np.testing.assert_allclose(errors[at], min(errors), rtol=1e-4)


def cut(w, limit):
    return np.clip(w, -limit, limit)


BAD = [
    ({"n_grid": 0}, "n_grid"),
    ({"duo_scaling": "half"}, "duo_scaling"),
    ({"objective": "block"}, "objective"),
    ({"scheme": "W4A61"}, "unknown scheme"),
    ({"scheme": "W4A16", "weights": FORMAT}, "leave out weights"),
    ({"targets": 3}, "targets"),
]


@pytest.mark.parametrize(("fields", "message"), BAD)
def test_bad_fields_are_named(fields, message):
    with pytest.raises((TypeError, ValueError), match=message):
        AWQ(**fields)
