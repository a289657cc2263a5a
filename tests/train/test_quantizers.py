"""Values and gradients of the methods beside torch's, and beside finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import qjax
from qjax.train.quantizers import fake_input, fake_weights, stored_weights

pytestmark = pytest.mark.usefixtures("strict")
K, N, M = 24, 10, 7
RNG = np.random.default_rng(0)
W = RNG.normal(size=(K, N)).astype(np.float32)
X = RNG.normal(size=(M, K)).astype(np.float32)
DW = RNG.normal(size=(K, N)).astype(np.float32)
DX = RNG.normal(size=(M, K)).astype(np.float32)


def weights(method, trained, w=W, dw=DW):
    """Value, gradient of the weights, gradients of what is learned."""
    run = lambda w, t: fake_weights(method, w, t, jnp.float32)
    return pulled(run, w, trained, dw)


def inputs(method, trained, x=X, dx=DX):
    return pulled(lambda x, t: fake_input(method, x, t), x, trained, dx)


def pulled(run, x, trained, cotangent):
    @jax.jit
    def both(x, trained, cotangent):
        value, back = jax.vjp(run, x, trained)
        return value, *back(cotangent)

    return both(jnp.asarray(x), trained, jnp.asarray(cotangent))


def leaf(value):
    return torch.tensor(np.asarray(value, np.float32), requires_grad=True)


def shared(x, step, low, high, cotangent):
    """The cotangent where torch's kernel and the paper have one gradient.

    The kernel asks whether the rounded value is inside, equation 3 whether `x / s` is.
    """
    units = x / np.asarray(step)
    between = (units < low) | (units > high)
    between &= (np.round(units) >= low) & (np.round(units) <= high)
    return np.where(between, np.float32(0), cotangent)


def rounded(x):
    """Straight-through rounding, as torch users write it."""
    return x + (x.round() - x).detach()


def close(got, want, **tolerance):
    want = want.detach().numpy() if isinstance(want, torch.Tensor) else want
    np.testing.assert_allclose(
        np.asarray(got), want, **{"rtol": 2e-5, "atol": 2e-6, **tolerance}
    )


@pytest.mark.parametrize("bits", [2, 4])
def test_lsq(bits):
    """Equations 1 and 2 with torch's derivatives."""
    method, high = qjax.LSQ(bits), 2 ** (bits - 1) - 1
    trained = method.init_weights(jnp.asarray(W))
    w, step = leaf(W), leaf(trained["step"])
    want = rounded((w / step).clamp(-high - 1, high)) * step
    want.backward(torch.tensor(DW))
    value, dw, dt = weights(method, trained)
    close(value, want)
    close(dw, w.grad)
    close(dt["step"], step.grad / np.sqrt(W.size * high), rtol=1e-4)


@pytest.mark.parametrize("bits", [2, 8])
def test_lsq_is_torchs_learnable_fake_quantize(bits):
    method, high = qjax.LSQ(bits), 2 ** (bits - 1) - 1
    trained = method.init_weights(jnp.asarray(W))
    close(trained["step"], [[2 * np.abs(W).mean() / np.sqrt(high)]])
    w, step = leaf(W), leaf(np.asarray(trained["step"]).reshape(1))
    factor = 1 / np.sqrt(W.size * high)
    want = torch._fake_quantize_learnable_per_tensor_affine(
        w, step, torch.zeros(1), -high - 1, high, factor
    )
    cotangent = shared(W, trained["step"], -high - 1, high, DW)
    want.backward(torch.tensor(cotangent))
    value, dw, dt = weights(method, trained, dw=cotangent)
    close(value, want)
    close(dw, w.grad)
    close(dt["step"].reshape(1), step.grad, rtol=1e-4)


def test_lsq_per_channel_is_torchs():
    method = qjax.LSQ(3, qjax.channel())
    trained = method.init_weights(jnp.asarray(W))
    w, step = leaf(W), leaf(np.asarray(trained["step"]).reshape(N))
    want = torch._fake_quantize_learnable_per_channel_affine(
        w, step, torch.zeros(N), 1, -4, 3, 1 / np.sqrt(K * 3)
    )
    cotangent = shared(W, trained["step"], -4, 3, DW)
    want.backward(torch.tensor(cotangent))
    value, dw, dt = weights(method, trained, dw=cotangent)
    close(value, want)
    close(dw, w.grad)
    close(dt["step"].reshape(N), step.grad, rtol=1e-4, atol=1e-5)


def test_lsq_of_unsigned_activations():
    method, x = qjax.LSQ(4, unsigned=True), np.maximum(X, 0)
    trained = {"step": jnp.full((1, 1), 0.11)}
    tx, step = leaf(x), leaf([0.11])
    want = torch._fake_quantize_learnable_per_tensor_affine(
        tx, step, torch.zeros(1), 0, 15, 1 / np.sqrt(K * 15)
    )
    cotangent = shared(x, 0.11, 0, 15, DX)
    want.backward(torch.tensor(cotangent))
    value, dx, dt = inputs(method, trained, x, cotangent)
    close(value, want)
    close(dx, tx.grad)
    close(dt["step"].reshape(1), step.grad, rtol=1e-4)


def test_lsq_plus_activations():
    method = qjax.LSQPlus(3)
    trained = {"step": jnp.full((1, 1), 0.4), "offset": jnp.full((1, 1), -1.3)}
    x, step, offset = leaf(X), leaf([[0.4]]), leaf([[-1.3]])
    want = rounded(((x - offset) / step).clamp(0, 7)) * step + offset
    want.backward(torch.tensor(DX))
    value, dx, dt = inputs(method, trained)
    factor = 1 / np.sqrt(K * 7)
    close(value, want)
    close(dx, x.grad)
    close(dt["step"], step.grad * factor, rtol=1e-4)
    close(dt["offset"], offset.grad * factor, rtol=1e-4)


def test_lsq_plus_starts_weights_from_three_deviations():
    step = qjax.LSQPlus(4).init_weights(jnp.asarray(W))["step"]
    reach = max(abs(W.mean() - 3 * W.std()), abs(W.mean() + 3 * W.std()))
    close(step, [[reach / 8]])


@pytest.mark.parametrize("signed", [False, True])
def test_pact(signed):
    method = qjax.PACT(4, signed=signed)
    trained = {"alpha": jnp.full((1, 1), 0.9)}
    x, alpha = leaf(X), leaf([[0.9]])
    if signed:
        clipped, levels = torch.minimum(torch.maximum(x, -alpha), alpha), 7
    else:  # equation 1 of the paper
        clipped, levels = 0.5 * (x.abs() - (x - alpha).abs() + alpha), 15
    with torch.no_grad():
        levelled = torch.round(clipped * levels / alpha) * alpha / levels
    want = clipped + (levelled - clipped).detach()
    want.backward(torch.tensor(DX))
    value, dx, dt = inputs(method, trained)
    close(value, want)
    close(dx, x.grad)
    close(dt["alpha"], alpha.grad, rtol=1e-4)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_dorefa_weights(bits):
    w = leaf(W)
    if bits == 1:
        want = w + (torch.sign(w) * w.abs().mean() - w).detach()
    else:
        unit = torch.tanh(w) / (2 * torch.tanh(w).abs().max()) + 0.5
        want = 2 * rounded(unit * (2**bits - 1)) / (2**bits - 1) - 1
    want.backward(torch.tensor(DW))
    value, dw, _ = weights(qjax.DoReFa(bits), {})
    close(value, want)
    close(dw, w.grad, atol=1e-5)


def test_dorefa_activations():
    x = leaf(X)
    want = rounded(x.clamp(0, 1) * 7) / 7
    want.backward(torch.tensor(DX))
    value, dx, _ = inputs(qjax.DoReFa(3), {})
    close(value, want)
    close(dx, x.grad)


@pytest.mark.parametrize("bits", [1, 1.58, 2])
def test_paretoq(bits):
    """The published forms, with torch's derivatives of their pieces."""
    method = qjax.ParetoQ(bits)
    trained = {"alpha": jnp.asarray(np.abs(W).max(0, keepdims=True) * 0.7)}
    w, alpha = leaf(W), leaf(trained["alpha"])
    units = w / alpha
    if bits == 1:
        inside = (units.abs() <= 1).float()
        want = torch.sign(w) * alpha
        estimate = want + inside * (w - w.detach())
    else:
        n, z = (2, 0.5) if bits == 2 else (1.5, 0.0)
        last = (n - z) / n
        levels = (torch.round(units.clamp(-0.99, 0.99) * n - z) + z) / n
        want, ends = levels * alpha, torch.sign(w) * last
        through = units + (levels - units).detach()
        estimate = alpha * torch.where(units.abs() <= last, through, ends)
    estimate.backward(torch.tensor(DW))
    value, dw, dt = weights(method, trained)
    close(value, want)
    close(dw, w.grad)
    close(dt["alpha"], alpha.grad / np.sqrt(K), rtol=1e-4, atol=1e-5)


def test_two_bits_of_paretoq_have_no_zero():
    method = qjax.ParetoQ(2)
    trained = method.init_weights(jnp.asarray(W))
    units = np.unique(np.round(weights(method, trained)[0] / trained["alpha"], 4))
    np.testing.assert_allclose(units, [-0.75, -0.25, 0.25, 0.75])


def test_xnor():
    w, alpha = leaf(W * 2), np.abs(W * 2).mean(0, keepdims=True)
    value, dw, _ = weights(qjax.XNOR(), {}, W * 2)
    close(value, np.sign(W) * alpha)
    close(dw, DW * (1 / K + alpha * (np.abs(w.detach().numpy()) <= 1)))


def test_bitnet():
    gamma = np.abs(W).mean()
    value, dw, _ = weights(qjax.BitNet(), {})
    close(value, np.clip(np.round(W / gamma), -1, 1) * gamma)
    close(dw, DW)


def test_binaryconnect():
    """Its mean over keys is the hard sigmoid's."""
    method, w = qjax.BinaryConnect("stochastic", scale=0.5), jnp.asarray(W)
    close(weights(method, {})[0], 0.5 * np.sign(W))
    close(weights(method, {})[1], DW)
    draw = jax.jit(jax.vmap(lambda k: fake_weights(method, w, {}, jnp.float32, k)))
    drawn = draw(jax.random.split(jax.random.key(0), 1024))
    assert set(np.unique(drawn)) == {-0.5, 0.5}
    close(drawn.mean(0), np.clip(W, -0.5, 0.5), rtol=0, atol=5 * 0.5 / 32)


def test_observed_is_torchs_fake_quantize():
    method = qjax.Observed(qjax.Int(8, qjax.tensor(), symmetric=False))
    ranges = {
        "low": jnp.full((1, 1), -0.8),
        "high": jnp.full((1, 1), 1.1),
        "batches": jnp.ones((1, 1), jnp.int32),
    }
    grid, x = method.input_grid(ranges), leaf(X)
    scale, zero = float(grid.scale[0, 0]), int(grid.zero[0, 0])
    want = torch.fake_quantize_per_tensor_affine(x, scale, zero, 0, 255)
    want.backward(torch.tensor(DX))
    value, back = jax.vjp(lambda x: fake_input(method, x, ranges), jnp.asarray(X))
    close(value, want)
    close(back(jnp.asarray(DX))[0], x.grad)


def test_stochastic_rounding_is_right_on_average():
    method = qjax.StraightThrough(qjax.Int(3, qjax.group(8)), rounding="stochastic")
    w = jnp.asarray(W)
    draw = jax.jit(jax.vmap(lambda k: fake_weights(method, w, {}, jnp.float32, k)))
    drawn = draw(jax.random.split(jax.random.key(0), 1024))
    grid = method.weight_format.fit(w)
    scale = jnp.repeat(grid.scale, 8, 0)
    inside = np.asarray(w / scale <= 3)
    error = np.abs(np.asarray(drawn.mean(0) - w) / scale)
    assert error[inside].max() < 5 * 0.5 / 32
    np.testing.assert_array_equal(
        fake_weights(method, w, {}, jnp.float32), stored_weights(method, w, {}).decode()
    )


# What each method rounds, without the rounding: its gradients are the estimator's.
SMOOTH_INPUTS = {
    "lsq": (
        qjax.LSQ(4),
        {"step": jnp.full((1, 1), 0.1)},
        lambda x, t: np.clip(x, -8 * t["step"], 7 * t["step"]),
        (),
    ),
    "lsq_plus": (
        qjax.LSQPlus(4),
        {"step": jnp.full((1, 1), 0.1), "offset": jnp.full((1, 1), -0.6)},
        lambda x, t: np.clip(x, t["offset"], t["offset"] + 15 * t["step"]),
        (("offset", np.sqrt(K * 15)),),
    ),
    "pact": (
        qjax.PACT(4),
        {"alpha": jnp.full((1, 1), 0.9)},
        lambda x, t: np.clip(x, 0, t["alpha"]),
        (("alpha", 1.0),),
    ),
    "dorefa": (qjax.DoReFa(4), {}, lambda x, t: np.clip(x, 0, 1), ()),
}


@pytest.mark.parametrize("name", SMOOTH_INPUTS)
def test_gradients_are_finite_differences_of_the_smoothed_function(name):
    """The step of LSQ has none: its gradient is the rounding error itself."""
    method, trained, smooth, learned = SMOOTH_INPUTS[name]
    _, dx, dt = inputs(method, trained)
    exact = {k: np.float64(v) for k, v in trained.items()}
    h = 1e-6

    def difference(up, down):
        return (up - down) / (2 * h)

    x = np.float64(X)
    close(dx, DX * difference(smooth(x + h, exact), smooth(x - h, exact)), rtol=1e-5)
    for field, scale in learned:
        up, down = ({**exact, field: exact[field] + s} for s in (h, -h))
        want = (DX * difference(smooth(x, up), smooth(x, down))).sum()
        close(dt[field][0, 0] * scale, want, rtol=1e-4)


def test_dorefa_weights_are_finite_differences_of_the_smoothed_function():
    def smooth(w):
        t = np.tanh(w)
        return (DW * t / np.abs(t).max()).sum()

    w, h = np.float64(W), 1e-6
    dw = weights(qjax.DoReFa(4), {})[1]
    for i, j in [(0, 0), (3, 5), np.unravel_index(np.abs(W).argmax(), W.shape)]:
        moved = np.zeros_like(w)
        moved[i, j] = h
        want = (smooth(w + moved) - smooth(w - moved)) / (2 * h)
        close(dw[i, j], want, rtol=1e-3, atol=1e-5)


BAD = {
    "LSQ.bits": lambda: qjax.LSQ(1),
    "LSQPlus.bits": lambda: qjax.LSQPlus(9),
    "PACT.alpha": lambda: qjax.PACT(alpha=0),
    "PACT.bits": lambda: qjax.PACT(1, signed=True),
    "DoReFa.bits": lambda: qjax.DoReFa(0),
    "ParetoQ.bits": lambda: qjax.ParetoQ(5),
    "BinaryConnect.rounding": lambda: qjax.BinaryConnect("up"),
    "BinaryConnect.scale": lambda: qjax.BinaryConnect(scale=-1),
    "StraightThrough.format": lambda: qjax.StraightThrough("W4A16"),
    "StraightThrough.rounding": lambda: qjax.StraightThrough(qjax.Int(4), rounding="x"),
    "StraightThrough.search": lambda: qjax.StraightThrough(qjax.Int(4), search="mse"),
    "Observed.momentum": lambda: qjax.Observed(qjax.Int(8, qjax.tensor()), momentum=1),
    "Observed.start": lambda: qjax.Observed(qjax.Int(8, qjax.tensor()), start=-1),
    "Observed.freeze": lambda: qjax.Observed(qjax.Int(8, qjax.tensor()), freeze=0),
    "Observed": lambda: qjax.Observed(qjax.Int(8, qjax.token())),
    "LSQ.granularity": lambda: qjax.QAT(qjax.LSQ(4), qjax.LSQ(8, qjax.token())),
    "LSQ.unsigned": lambda: qjax.QAT(qjax.LSQ(4, unsigned=True)),
    "QAT.weights": lambda: qjax.QAT(qjax.PACT(4)),
    "QAT.activations": lambda: qjax.QAT(qjax.LSQ(4), qjax.BitNet()),
}


@pytest.mark.parametrize("field", BAD)
def test_bad_fields_are_named(field):
    with pytest.raises((ValueError, TypeError), match=rf"^{field}\b"):
        BAD[field]()
