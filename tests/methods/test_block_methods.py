"""BRECQ, OmniQuant, EfficientQAT and LKD beside their formulas in torch.

One linear, one loop of torch's autograd and Adam for each method, written from the
papers; the same arrays, the same steps.
"""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import qjax
from qjax.blocksolver import optimised
from qjax.core.coded import encode
from qjax.core.formats import Int, group
from qjax.core.qtensor import Activation, dequantize
from qjax.descent import descended

K, N, M, G, BITS, ITERS = 32, 8, 64, 16, 3, 12
ASYM = Int(BITS, group(G), symmetric=False, zero="int")
TOP = 2**BITS - 1
RNG = np.random.default_rng(0)
W = (RNG.standard_t(4, (K, N)) * 0.1).astype(np.float32)
X = (RNG.normal(size=(M, K)) * np.exp(RNG.normal(size=K))).astype(np.float32)
x, w = torch.tensor(X), torch.tensor(W)


def learned(method, acts=None):
    """Ours after `ITERS` steps, and the weight that it stands for."""

    def error(leaves, chosen):
        y = jnp.asarray(X) @ leaves[0]
        square = jnp.square(y - jnp.asarray(X) @ jnp.asarray(W))
        return square.sum(-1).mean() if method.summed else square.mean()

    def faked(found, progress):
        v, t_in = (
            method.fake(jnp.asarray(W), found[0], progress),
            method.moved(found[0]),
        )
        return [v if t_in is None else t_in.left(v)]

    @jax.jit
    def run():
        start = [method.init(jnp.asarray(W))]
        key = jax.random.key(0)
        (out,) = descended([method], start, faked, [error], [(1, 1)], key)
        return out, method.finish(jnp.asarray(W), out).decoded()

    with jax.default_matmul_precision("highest"):
        return run()


def straight(value):
    return (torch.round(value) - value).detach() + value


def spread(per_group):
    return per_group.repeat_interleave(G, 0)


def minmax(values):
    blocks = values.reshape(K // G, G, N)
    low, high = blocks.amin(1).clamp(max=0), blocks.amax(1).clamp(min=0)
    return low, high


def quantized(steps, zero, scale):
    """`s (clip(round(steps) + z) - z)`, straight-through."""
    codes = torch.clamp(straight(steps) + zero, 0, TOP)
    return (codes - zero) * scale


def adam(groups, loss):
    optimizer = torch.optim.Adam(groups)
    for step in range(ITERS):
        for group_ in optimizer.param_groups:
            falls = group_.get("cosine")
            if falls:
                part = 0.5 * (1 + np.cos(np.pi * step / ITERS))
                group_["lr"] = falls * (0.95 * part + 0.05)
        optimizer.zero_grad()
        loss(step).backward()
        optimizer.step()


def leaf(array):
    return torch.tensor(np.array(array, np.float32), requires_grad=True)


def close(ours, theirs, slack=1e-4):
    theirs = theirs.detach().numpy() if hasattr(theirs, "detach") else theirs
    np.testing.assert_allclose(ours, theirs, atol=slack * np.abs(theirs).max())


def test_brecq_learns_what_adarounds_formulas_learn():
    """Rectified sigmoid, its start, the regulariser and its falling exponent."""
    method = qjax.BRECQ(weights=ASYM, iters=ITERS, lr=0.05, warmup=0.25)
    ours, found = learned(method)
    scale, zero = (spread(torch.tensor(np.asarray(ours[n]))) for n in ("scale", "zero"))
    floor = torch.floor(w / scale)
    share = w / scale - floor
    v = leaf(-np.log(1.2 / (share.numpy() + 0.1) - 1))

    def up():
        return torch.clamp(torch.sigmoid(v) * 1.2 - 0.1, 0, 1)

    def loss(step):
        weight = (torch.clamp(floor + up() + zero, 0, TOP) - zero) * scale
        error = (x @ weight - x @ w).pow(2).sum(-1).mean()
        if step < 0.25 * ITERS:
            return error
        past = (step / ITERS - 0.25) / 0.75
        beta = 2 + 18 * (1 - past)
        return error + 0.01 * (1 - (2 * up() - 1).abs().pow(beta)).sum()

    adam([{"params": [v], "lr": 0.05}], loss)
    close(ours["v"], v, 1e-3)
    hard = (torch.clamp(floor + (up() >= 0.5) + zero, 0, TOP) - zero) * scale
    assert np.mean(np.abs(found - hard.detach().numpy()) < 1e-6) > 0.99


@pytest.mark.parametrize("let", [False, True])
def test_omniquant_learns_what_its_formulas_learn(let):
    """Clipping of equation 2, and with `let` the scales of equation 3."""
    method = qjax.OmniQuant(weights=ASYM, iters=ITERS, lr=0.05, let=let, let_lr=0.02)
    ours, found = learned(method)
    low, high = (leaf(np.full((K // G, N), 4.0)) for _ in range(2))
    move = leaf(np.zeros(K))

    def weight():
        s = torch.exp(move)[:, None]
        bottom, top = minmax(w * s)
        bottom, top = bottom * torch.sigmoid(low), top * torch.sigmoid(high)
        scale = (top - bottom) / TOP
        zero = torch.round(-bottom / scale).detach()
        scale, zero = spread(scale), spread(zero)
        return quantized(w * s / scale, zero, scale) / s

    groups = [{"params": [low, high], "lr": 0.05}]
    groups += [{"params": [move], "lr": 0.02}] if let else []
    adam(groups, lambda step: (x @ weight() - x @ w).pow(2).mean())
    close(ours["low"], low, 1e-3)
    close(ours["high"], high, 1e-3)
    if let:
        close(ours["scale"], move, 1e-2)
        assert np.abs(ours["scale"]).max() > 0.05
    same = np.abs(found - weight().detach().numpy()) < 1e-4
    assert same.mean() > 0.99


def test_efficientqat_learns_what_its_formulas_learn():
    """Weights, scales and zero points together."""
    method = qjax.EfficientQAT(weights=ASYM, iters=ITERS, lr=1e-3, weight_lr=2e-3)
    ours, found = learned(method)
    grid = ASYM.fit(jnp.asarray(W))
    own, scale, zero = leaf(W), leaf(grid.scale), leaf(grid.zero)

    def weight():
        whole = spread(torch.clamp(straight(zero), 0, TOP))
        return quantized(own / spread(scale), whole, spread(scale))

    groups = [
        {"params": [own], "lr": 2e-3, "cosine": 2e-3},
        {"params": [scale, zero], "lr": 1e-3, "cosine": 1e-3},
    ]
    adam(groups, lambda step: (x @ weight() - x @ w).pow(2).mean())
    for name, theirs in (("w", own), ("scale", scale), ("zero", zero)):
        close(ours[name], theirs, 1e-3)
    assert np.mean(np.abs(found - weight().detach().numpy()) < 1e-4) > 0.99


def test_lkd_learns_what_straight_through_training_learns():
    method = qjax.ZeroQuantLKD(weights=ASYM, iters=ITERS, lr=1e-3)
    ours, found = learned(method)
    own = leaf(W)

    def weight():
        # Ranges are taken anew at every step, and have no gradient.
        near = encode(jnp.asarray(own.detach().numpy()), method.format).decode()
        return (torch.tensor(np.asarray(near)) - own).detach() + own

    groups = [{"params": [own], "lr": 1e-3}]
    adam(groups, lambda step: (x @ weight() - x @ w).pow(2).mean())
    # A weight on the edge of two codes, once rounded the other way, moves a column.
    assert np.mean(np.abs(ours["w"] - own.detach().numpy()) < 1e-4) > 0.95
    assert np.mean(np.abs(found - weight().detach().numpy()) < 1e-4) > 0.98


L, D, H = 2, 32, 64


def unrolled(params, x):
    for p in params["layers"]:
        x = x + jnp.tanh(x @ p["up"]) @ p["down"]
    return x


@cache
def model():
    rng = np.random.default_rng(1)

    def draw(*shape):
        return jnp.asarray(rng.standard_t(5, shape) * 0.15, jnp.float32)

    return {"layers": [{"up": draw(D, H), "down": draw(H, D)} for _ in range(L)]}


def batches():
    """Features of very different sizes, as in large language models."""
    rng = np.random.default_rng(2)
    size = np.ones(D)
    size[:3] = 30
    return [((rng.normal(size=(4, 8, D)) * size).astype(np.float32),) for _ in range(4)]


W4A4 = {
    "weights": Int(4, group(16), symmetric=False, zero="int"),
    "activations": Activation(Int(4, group(16))),
}


def block_error(recipe):
    """Of the model's output, with coded activations."""
    q = qjax.quantize(
        unrolled, model(), recipe, batches(), key=jax.random.key(0), progress=False
    )
    pairs = [(qjax.apply(unrolled)(q, x), unrolled(model(), x)) for (x,) in batches()]
    return q, sum(float(jnp.sum(jnp.square(a - b))) for a, b in pairs)


def test_scales_of_inputs_are_learned_on_coded_activations():
    """One program for both blocks; with the transformation far below clipping alone."""
    optimised.clear_cache()
    tuned = qjax.OmniQuant(**W4A4, iters=40, batch_size=4, lr=0.02, let_lr=0.1)
    moved, with_let = block_error(tuned)
    assert optimised._cache_size() == 1
    assert moved["layers"][0]["up"].moved
    fixed = qjax.OmniQuant(**W4A4, iters=40, batch_size=4, lr=0.02, let=False)
    _, clipped = block_error(fixed)
    _, nearest = block_error(qjax.RTN(**W4A4))
    assert with_let < 0.8 * clipped < 0.8 * 1.1 * nearest


def test_scales_alone_are_trained_end_to_end():
    """E2E-QP: codes stay, the loss of the whole model falls."""
    coarse = qjax.RTN(weights=Int(2, group(16), symmetric=False, zero="int"))
    q = qjax.quantize(unrolled, model(), coarse, batches(), progress=False)
    start = qjax.scales_of(q)
    assert set(start) == {f"layers/{i}/{n}" for i in range(L) for n in ("up", "down")}
    (x,) = batches()[0]
    target, run = unrolled(model(), x), qjax.apply(unrolled)

    def loss(scales):
        return jnp.mean(jnp.square(run(qjax.with_scales(q, scales), x) - target))

    @jax.jit
    def trained(scales):
        optimizer = optax.adam(2e-3)

        def step(carry, _):
            scales, state = carry
            change, state = optimizer.update(jax.grad(loss)(scales), state)
            return (optax.apply_updates(scales, change), state), None

        carry = scales, optimizer.init(scales)
        return jax.lax.scan(step, carry, None, length=40)[0][0]

    new = qjax.with_scales(q, trained(start))
    assert float(loss(qjax.scales_of(new))) < 0.7 * float(loss(start))
    for a, b in zip(jax.tree.leaves(q), jax.tree.leaves(new)):
        assert a.dtype == b.dtype
        if not jnp.issubdtype(a.dtype, jnp.floating):
            np.testing.assert_array_equal(a, b)
    assert dequantize(new)["layers"][0]["up"].shape == (D, H)


def test_refusals_of_scales():
    with pytest.raises(ValueError, match="no leaf is quantized"):
        qjax.scales_of(model())
    q = qjax.quantize(
        unrolled, model(), qjax.RTN("MXFP4A16"), batches(), progress=False
    )
    with pytest.raises(ValueError, match="which cannot be trained"):
        qjax.scales_of(q)
