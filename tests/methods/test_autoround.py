"""AutoRound beside auto-round's own quantizer and optimizer, and what it gains.

`scripts/parity/golden_autoround.py` made the arrays.
"""

import json
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.blocksolver import optimised
from qjax.core.formats import Int, channel, group
from qjax.core.qtensor import dequantize
from qjax.descent import descended
from qjax.methods.autoround import AutoRound

GOLDEN = Path(__file__).parents[1] / "golden/autoround.npz"
ITERS = 16
CASES = [
    f"{kind}{bits}_g{size}"
    for kind in ("sym", "asym")
    for bits, size in ((4, 16), (3, 32), (2, 16), (4, 0))
]


@cache
def golden():
    with np.load(GOLDEN) as held:
        return dict(held)


def method(case):
    kind, size = case.rsplit("_g", 1)
    blocks, bits = group(int(size)) if int(size) else channel(), int(kind[-1])
    if kind.startswith("asym"):
        format = Int(bits, blocks, symmetric=False, zero="int")
    else:
        format = Int(bits, blocks, scale_rule="signed")
    return AutoRound(weights=format, iters=ITERS)


@pytest.fixture(scope="module", params=CASES)
def steps(request):
    """The peer's arrays; our gradients at the start, and what we learn."""
    case, held = request.param, golden()
    ours, w, x = method(case), jnp.asarray(held["w"]), jnp.asarray(held["x"])

    def error(leaves, chosen):
        return jnp.mean(jnp.square(x @ leaves[0] - x @ w))

    def faked(learned, progress):
        return [ours.fake(w, learned[0], progress)]

    @jax.jit
    def run():
        start = [ours.init(w)]
        slope = jax.grad(lambda t: error(faked(t, 0), None))(start)[0]
        key = jax.random.key(0)
        (learned,) = descended([ours], start, faked, [error], [(1, 1)], key)
        found = ours.finish(w, learned).parts[0].decode(jnp.float32)
        return slope, learned, ours.fake(w, learned), found

    with jax.default_matmul_precision("highest"):
        out = run()
    theirs = {n.split("/")[1]: a for n, a in held.items() if n.startswith(f"{case}/")}
    return theirs, out


def test_gradients_are_the_references(steps):
    theirs, (slope, *_) = steps
    for name in ("v", "low", "high"):
        expected = theirs[f"grad_{name}"]
        slack = 1e-5 * np.abs(expected).max()
        np.testing.assert_allclose(slope[name], expected, rtol=1e-4, atol=slack)


def test_learns_what_the_reference_learns(steps):
    theirs, (_, learned, faked, found) = steps
    for name in ("v", "low", "high"):
        same = np.abs(np.asarray(learned[name]) - theirs[name]) < 1e-6
        assert same.mean() >= 0.999
    np.testing.assert_array_equal(faked, found)
    same = np.abs(np.asarray(found) - theirs["weight"]) < 1e-6
    assert same.mean() >= 0.999


L, D, H = 3, 32, 64
W2 = Int(2, group(16), scale_rule="signed")


def layer(p, x):
    return x + jnp.tanh((x * p["norm"]) @ p["up"]) @ p["down"]


def unrolled(params, x):
    for p in params["layers"]:
        x = layer(p, x)
    return x


def scanned(params, x):
    return jax.lax.scan(lambda x, p: (layer(p, x), None), x, params["layers"])[0]


@cache
def model():
    rng = np.random.default_rng(1)

    def draw(*shape):
        return jnp.asarray(rng.standard_t(5, shape) * 0.15, jnp.float32)

    return {
        "layers": [
            {"norm": jnp.ones(D) + draw(D), "up": draw(D, H), "down": draw(H, D)}
            for _ in range(L)
        ]
    }


def stack(params):
    return {"layers": jax.tree.map(lambda *x: jnp.stack(x), *params["layers"])}


@cache
def batches(sizes=(4,) * 6, seed=2):
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(D, D)) / np.sqrt(D) + 0.5 * np.eye(D)
    rows = [rng.normal(size=(size, 8, D)) @ mix for size in sizes]
    return [(x.astype(np.float32),) for x in rows]


def run(recipe, f=unrolled, params=None, data=None, seed=0, **options):
    params = model() if params is None else params
    return qjax.quantize_with_report(
        f,
        params,
        recipe,
        batches() if data is None else data,
        key=jax.random.key(seed),
        progress=False,
        **options,
    )


@cache
def solved(recipe, seed=0):
    return run(recipe, seed=seed)


def same(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(x, y) for x, y in pairs)


def output_error(q, data=None):
    """On inputs that were not seen in calibration."""
    x = (batches((64,), 3) if data is None else data)[0][0]
    return float(jnp.sum(jnp.square(unrolled(dequantize(q), x) - unrolled(model(), x))))


TUNED = AutoRound(weights=W2, iters=60)


def test_beats_rounding_and_gptq_at_two_bits():
    mine = output_error(solved(TUNED)[0])
    assert mine < 0.7 * output_error(solved(qjax.RTN(weights=W2))[0])
    assert mine < output_error(solved(qjax.GPTQ(weights=Int(2, group(16))))[0])


def test_blocks_of_one_shape_share_one_program_scanned_or_not():
    q, _ = solved(TUNED)
    before = optimised._cache_size()
    assert before >= 1
    optimised.clear_cache()
    again, report = run(TUNED)
    assert optimised._cache_size() == 1
    deep, _ = run(TUNED, scanned, stack(model()))
    assert optimised._cache_size() == 1
    assert same(stack(q), deep) and same(q, again)
    for row in report.sites:
        assert row.measured == "block" and row.error < row.error_before
        assert row.samples == 6 * 4 * 8


def test_another_key_draws_other_batches():
    assert not same(solved(TUNED)[0], solved(TUNED, seed=1)[0])


def test_resumes_with_the_same_bits(tmp_path):
    whole, _ = run(TUNED, resume=tmp_path / "journal")
    last = max((tmp_path / "journal").glob("block-*"))
    last.rename(tmp_path / "gone")
    again, _ = run(TUNED, resume=tmp_path / "journal")
    assert same(whole, again) and same(whole, solved(TUNED)[0])


def test_batches_of_two_shapes():
    q, _ = run(TUNED, data=batches((4, 4, 4, 4, 4, 2)))
    assert output_error(q) < 0.7 * output_error(solved(qjax.RTN(weights=W2))[0])


def test_padding_has_no_part():
    wild = [(np.concatenate([x, 1e3 * x[:, :2]], 1),) for (x,) in batches()]
    mask = lambda x: (np.arange(x.shape[1]) < 8) * np.ones((len(x), 1))
    masked, report = run(TUNED, data=wild, mask_fn=mask)
    plain = [(np.concatenate([x, x[:, :2]], 1),) for (x,) in batches()]
    other, _ = run(TUNED, data=plain, mask_fn=mask)
    assert same(masked, other)
    assert report.sites[0].samples == 6 * 4 * 8 and not report.sites[0].fallback


def test_a_block_may_have_sites_of_several_methods():
    """Two formats that learn together, and a site that is solved by itself behind."""
    recipe = (
        AutoRound(weights=W2, iters=20, targets="*/up"),
        AutoRound(weights=Int(4, group(16)), iters=20, targets="layers/[01]/down"),
        qjax.RTN(weights=Int(3, group(16)), targets="layers/2/down"),
    )
    q, report = run(recipe)
    kinds = {row.name: (row.format, row.measured) for row in report.sites}
    assert kinds["layers/0/down"] == ("int4 g16", "block")
    assert kinds["layers/2/down"] == ("int3 g16", "diagonal")
    assert output_error(q) < 0.7 * output_error(solved(qjax.RTN(weights=W2))[0])


def test_refusals():
    other = AutoRound(weights=W2, iters=3, targets="*/down")
    with pytest.raises(ValueError, match="layers/0 has sites with iters 60 and 3"):
        run((other, TUNED))
    with pytest.raises(ValueError, match="BiasCorrection cannot repair layers/0/"):
        run((TUNED, qjax.BiasCorrection()))
    with pytest.raises(TypeError, match="solves single sites"):
        qjax.QEP(then=TUNED)
    kept = qjax.Activation(qjax.Int(8, qjax.token()), outliers=6.0)
    with pytest.raises(ValueError, match=r"AutoRound\.activations has outliers=6\.0"):
        AutoRound(weights=W2, activations=kept)
    with pytest.raises(ValueError, match="give key"):
        qjax.quantize(unrolled, model(), TUNED, batches(), progress=False)
    bad = [(np.full((4, 8, D), np.inf, np.float32),)]
    with pytest.raises(ValueError, match=r"layers/0 holds \d+ NaN"):
        run(TUNED, data=bad)


def test_presets_are_the_references():
    light, best = AutoRound.light(), AutoRound.best("W2A16")
    assert (light.iters, light.lr, light.batch_size) == (50, 5e-3, 8)
    assert best.iters == 1000 and best.step_sizes == (2e-3, 2e-3)
    assert AutoRound.best().step_sizes == (1e-3, 1e-3)
    assert AutoRound().step_sizes == (1 / 200, 1 / 200)
    assert AutoRound().format == Int(4, group(128), scale_rule="signed")
    assert AutoRound("W4A16_ASYM").format.zero == "int"


def test_recipes_of_llm_compressor():
    """Symmetric weights have auto-round's full range there too."""
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}
    group_0 = {"weights": weights, "targets": ["Linear"]}
    given = {"scheme": "W4A16", "iters": 50, "targets": "Linear", "ignore": ["lm_head"]}
    for modifier, expected in (
        (given, AutoRound("W4A16", iters=50)),
        (
            {"config_groups": {"group_0": group_0}, "ignore": ["lm_head"]},
            AutoRound(weights=Int(4, group(128), scale_rule="signed")),
        ),
    ):
        stage = {"quant_stage": {"quant_modifiers": {"AutoRoundModifier": modifier}}}
        assert qjax.read_recipe(json.dumps(stage)) == (expected,)
