"""Padding among the rows of experts: what a pass sees is what it sees without it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.allocate import MixedPrecision, allocate
from qjax.core.statistics import AbsMaximum, Hessian, SecondMoment
from qjax.quantize import quantize_with_report
from qjax.streaming import Pass
from qjax.trace.marks import way_to

D, E, H = 16, 4, 24
LENGTHS = (9, 5, 5)
MASK = jnp.arange(9) < jnp.array(LENGTHS)[:, None]
STATISTICS = {"h": Hessian(), "max": AbsMaximum(), "rms": SecondMoment()}
INT3 = qjax.Int(3, qjax.group(8))


def masked(*inputs):
    return MASK.astype(jnp.float32)


def quantized(f, params, recipe, batches, **options):
    return quantize_with_report(f, params, recipe, batches, progress=False, **options)


def experts_of(params):
    """The experts' leaves of a model."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): x
        for path, x in jax.tree_util.tree_leaves_with_path(params)
        if "experts" in jax.tree_util.keystr(path)
    }


@pytest.fixture(scope="module", params=["qwen3_moe", "mixtral"])
def padded(request, kit):
    """A model, its padded batch, and the same sequences without padding."""
    scanned = request.param == "mixtral"
    f, params = kit.model(request.param, layers=1 + scanned, scan_layers=scanned)
    tokens = kit.tokens(len(LENGTHS), max(LENGTHS))
    rows = [(tokens[:1],), (tokens[1:, : LENGTHS[1]],)]
    return f, params, [(tokens,)], rows


def test_statistics_are_those_without_padding(padded):
    f, params, batch, rows = padded
    got = qjax.observe(f, params, batch, STATISTICS, mask_fn=masked)
    want = qjax.observe(f, params, rows, STATISTICS)
    assert got.keys() == want.keys()
    sites = [name for name in got if "experts" in name]
    assert len(sites) in (3, 6)
    counted = qjax.observe(f, params, batch, STATISTICS)
    for name in sites:
        for kind, value in want[name].items():
            top = np.abs(value).max()
            np.testing.assert_allclose(got[name][kind], value, atol=1e-4 * top)
            assert np.abs(counted[name][kind] - value).max() > 1e-2 * top


def test_gptq_is_that_without_padding(padded):
    """Also where the router is quantized, and stops the pass on the way."""
    f, params, batch, rows = padded
    method = qjax.GPTQ(weights=INT3, ignore=())
    q, report = quantized(f, params, method, batch, mask_fn=masked)
    assert not any("padding" in row.fallback for row in report.sites)
    same, other = quantized(f, params, method, rows)
    assert [r.samples for r in report.sites] == [r.samples for r in other.sites]
    got, want = (experts_of(qjax.dequantize(each)) for each in (q, same))
    for name, value in want.items():
        assert np.mean(np.asarray(got[name]) == np.asarray(value)) > 0.995


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def routed(p, x, chosen=2, deciding=None):
    """Experts of one layer; the rows of a token go where `deciding` says."""
    tokens = x.reshape(-1, D)
    deciding = tokens @ p["router"] if deciding is None else deciding
    _, experts = jax.lax.top_k(deciding, chosen)
    order = jnp.argsort(experts.reshape(-1))
    sizes = jnp.bincount(experts.reshape(-1), length=E).astype(jnp.int32)
    inner = jax.lax.ragged_dot(tokens[order // chosen], p["up"], sizes)
    return jax.lax.ragged_dot(jax.nn.silu(inner), p["down"], sizes)


def layer_params():
    return {
        "router": normal(D, E),
        "up": normal(E, D, H, seed=1),
        "down": normal(E, H, D, seed=2) / 4,
    }


def close(got, want):
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-4, atol=1e-4)


def test_huge_padding_moves_no_static_range():
    params, x = layer_params(), normal(3, 9, D)
    huge = jnp.where(MASK[..., None], x, 1e4 * x)
    activation = qjax.Activation(qjax.Int(8, qjax.tensor()), dynamic=False)
    method = qjax.RTN(weights=qjax.Int(8), activations=activation)

    def scales(batch, **options):
        q, report = quantized(routed, params, method, [(batch,)], **options)
        assert not any("padding" in row.fallback for row in report.sites)
        return {n: q[n].acts[0].scale for n in ("up", "down")}

    kept = {"mask_fn": masked}
    close(scales(huge, **kept), scales(x[MASK][None]))
    assert np.max(scales(huge)["up"]) > 100 * np.max(scales(huge, **kept)["up"])


def test_sensitivity_is_that_without_padding():
    params, x = layer_params(), normal(3, 9, D)
    huge = jnp.where(MASK[..., None], x, 1e4 * x)
    candidates = tuple(qjax.RTN(weights=qjax.Int(b)) for b in (3, 8))
    step = MixedPrecision(candidates, target_bits=6, sensitivity="hessian", ignore=())
    _, got = allocate(routed, params, [(huge,)], step, mask_fn=masked)
    _, want = allocate(routed, params, [(x[MASK][None],)], step)
    assert [row.name for row in got.rows] == ["router", "up", "down"]
    for a, b in zip(got.rows, want.rows, strict=True):
        np.testing.assert_allclose(a.errors, b.errors, rtol=1e-4)


@pytest.mark.parametrize("targets", ["down", ("up", "down"), None])
def test_padding_may_hold_anything_whatever_stops_the_pass(targets):
    params, x = layer_params(), normal(3, 9, D)
    bad = jnp.where(MASK[..., None], x, jnp.nan)
    got = qjax.observe(
        routed, params, [(bad,)], Hessian(), targets=targets, mask_fn=masked
    )
    want = qjax.observe(routed, params, [(x[MASK][None],)], Hessian(), targets=targets)
    assert "down" in got
    close(got, want)


def test_one_expert_for_each_token_of_one_sequence():
    """Rows behind the routing have the mask's shape, and are not taken for tokens."""
    f = lambda p, x: routed(p, x, chosen=1)
    params, x, mask = layer_params(), normal(9, D), jnp.arange(9) % 3 > 0
    got = qjax.observe(f, params, [(x,)], Hessian(), mask_fn=lambda x: mask)
    close(got, qjax.observe(f, params, [(x[mask],)], Hessian()))


def test_weights_that_are_not_0_or_1():
    """A token that counts three times is one that is there three times."""
    params, x = layer_params(), normal(1, 12, D)
    counts = np.arange(12) % 5
    got = qjax.observe(
        routed,
        params,
        [(x,)],
        STATISTICS,
        mask_fn=lambda x: jnp.asarray(counts, jnp.float32)[None],
    )
    repeated = jnp.repeat(x, counts, axis=1, total_repeat_length=int(counts.sum()))
    want = qjax.observe(routed, params, [(repeated,)], STATISTICS)
    for name in ("up", "down"):
        close(got[name], want[name])


def test_batches_of_several_shapes_and_masks():
    params = layer_params()
    batches = [(normal(2, 5, D, seed=s),) for s in (3, 4)] + [(normal(3, 4, D),)]
    masks = {x.shape: normal(*x.shape[:2], seed=5) > 0 for (x,) in batches}
    got = qjax.observe(
        routed, params, batches, Hessian(), mask_fn=lambda x: masks[x.shape]
    )
    rows = [(x[masks[x.shape]][None],) for (x,) in batches]
    close(got, qjax.observe(routed, params, rows, Hessian()))


def test_a_killed_pass_knows_the_rows_when_it_goes_on(tmp_path, monkeypatch):
    """It goes on between two sites that have the same rows."""
    params, x = layer_params(), normal(3, 9, D)
    method = qjax.GPTQ(weights=INT3, ignore="router")
    args = routed, params, method, [(x,)]
    whole, _ = quantized(*args, mask_fn=masked)
    solve = Pass.solve

    def killed(self, point):
        if self.stream.at == 1:
            raise KeyboardInterrupt
        solve(self, point)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Pass, "solve", killed)
        quantized(*args, mask_fn=masked, resume=tmp_path)
    q, report = quantized(*args, mask_fn=masked, resume=tmp_path)
    assert [row.fallback for row in report.sites] == ["", ""]
    for a, b in zip(*map(jax.tree.leaves, (whole, q)), strict=True):
        np.testing.assert_array_equal(a, b)


def hashed(p, x, ids):
    """Routing that no value of a token decides."""
    return routed(p, x, deciding=jax.nn.one_hot(ids.reshape(-1) % E, E))


def mixed(p, x):
    """Tokens mix between the router and the experts."""
    deciding = x.reshape(-1, D) @ p["router"]
    return routed(p, x - x.mean(1, keepdims=True), deciding=deciding)


def dropped(p, x):
    """Experts have room for so many tokens; who comes late is not seen."""
    tokens = x.reshape(-1, D)
    experts = jnp.argmax(tokens @ p["router"], -1)
    sizes = jnp.minimum(jnp.bincount(experts, length=E), 4).astype(jnp.int32)
    return jax.lax.ragged_dot(tokens[jnp.argsort(experts)], p["up"], sizes)


@pytest.mark.parametrize("f", [hashed, mixed, dropped])
def test_where_rows_are_not_known_it_is_said(f):
    params, x = layer_params(), normal(3, 9, D)
    if f is dropped:
        params = {n: w for n, w in params.items() if n != "down"}
    if f is hashed:
        params = {n: w for n, w in params.items() if n != "router"}
    batch = (x, jnp.arange(27).reshape(3, 9)) if f is hashed else (x,)
    method = qjax.GPTQ(weights=INT3, ignore=() if f is hashed else "router")
    q, report = quantized(f, params, method, [batch], mask_fn=masked)
    said = "the mask does not fit the tokens here: padding was counted"
    assert all(said in row.fallback for row in report.sites)
    same, _ = quantized(f, params, method, [batch])
    np.testing.assert_array_equal(*(qjax.dequantize(each)["up"] for each in (q, same)))
    with pytest.raises(ValueError, match=r"mask of batch 0.*does not fit.*up sees"):
        qjax.observe(f, params, [batch], Hessian(), mask_fn=masked)


def test_the_way_is_short(kit):
    """Neither experts nor the router are run again."""
    f, params = kit.model("qwen3_moe")
    (lane,) = kit.lanes(f, params, [(kit.tokens(3, 9),)])
    paths = lane.program.paths
    for _, op in lane.meetings:
        if op.call.kind != "ragged_dot" or "down" in paths[op.weight.leaf]:
            continue
        way = way_to(lane.tape, op, (3, 9))
        assert way is not None
        assert way.segment.leaves == ()
        assert len(way.segment.ops) < 10
