"""HQQ against the reference implementation, and the properties of its solve."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.core.formats import Int, block, channel, group
from qjax.methods import HQQ, RTN
from qjax.methods.hqq import half_quadratic, shrink


def weights(kind, K=256, N=96, seed=0):
    rng = np.random.default_rng(seed)
    if kind == "heavy":
        return (rng.standard_t(4, (K, N)) * 0.02).astype(np.float32)
    return (rng.normal(size=(K, N)) * {"normal": 0.02, "wide": 1.0}[kind]).astype(
        np.float32
    )


def solved(w, method):
    with jax.numpy_dtype_promotion("strict"):
        return np.asarray(
            jax.jit(lambda w: method.solve(w)[0].decode(jnp.float32))(jnp.asarray(w))
        )


def reference(w, bits):
    """What package `hqq` makes of the same array (`[out, in]`, groups along `in`)."""
    torch = pytest.importorskip("torch")
    quantizer = pytest.importorskip("hqq.core.quantize").Quantizer
    codes, meta = quantizer.quantize(
        torch.from_numpy(w.T.copy()),
        nbits=bits,
        group_size=64,
        axis=1,
        device="cpu",
        bitpack=False,
    )
    return ((codes - meta["zero"]) * meta["scale"]).reshape(w.T.shape).numpy().T


def errors(w, q):
    d = np.abs(w - q)
    return np.array([d.mean(), (d**2).mean() ** 0.5, (d**0.7).mean()])


@pytest.mark.parametrize("kind", ["normal", "heavy", "wide"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_error_is_the_reference_s_within_one_percent(kind, bits):
    w = weights(kind)
    ours, theirs = errors(w, solved(w, HQQ(bits=bits))), errors(w, reference(w, bits))
    np.testing.assert_allclose(ours, theirs, rtol=0.01)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 8])
def test_beats_the_grid_it_starts_from(bits):
    w = weights("heavy")
    start = RTN(weights=HQQ(bits=bits).format)
    ours, rtn = errors(w, solved(w, HQQ(bits=bits))), errors(w, solved(w, start))
    assert (ours < rtn).all()


@pytest.mark.parametrize("p", [0.5, 0.7, 1.0])
def test_shrink_is_the_published_step(p):
    d = np.linspace(-2, 2, 81, dtype=np.float32)
    beta = np.float32(10)
    size = np.abs(d).astype(np.float64)
    power = np.where(size > 0, np.maximum(size, 1e-30) ** (p - 1), np.inf)
    expected = np.sign(d) * np.maximum(size - power / beta, 0)
    np.testing.assert_allclose(shrink(jnp.asarray(d), beta, p), expected, atol=1e-6)


def test_more_iterations_never_hurt_a_group():
    w = weights("heavy")
    before = np.full((4, 96), np.inf)
    for iters in (1, 3, 10, 30):
        d = np.abs(w - solved(w, HQQ(bits=3, iters=iters)))
        now = d.reshape(4, 64, 96).mean(1)
        assert (now <= before * (1 + 1e-5)).all()
        before = now


def test_partial_last_group_is_solved_as_if_alone():
    w = weights("normal", K=100)
    whole = half_quadratic(jnp.asarray(w), HQQ())
    tail = half_quadratic(jnp.asarray(w[64:]), HQQ(group_size=36))
    np.testing.assert_allclose(whole.zero[1], tail.zero[0], atol=1e-4)
    np.testing.assert_allclose(whole.scale[1], tail.scale[0], rtol=1e-6)


@pytest.mark.parametrize("granularity", [channel(), group(48), block(32, 8)])
def test_any_granularity(granularity):
    w = weights("normal", K=112, N=20)
    method = HQQ(weights=Int(4, granularity, zero="float"))
    q, start = solved(w, method), solved(w, RTN(weights=method.format))
    assert np.abs(w - q).mean() < np.abs(w - start).mean()


def test_leading_axes_are_solved_alone():
    w = np.stack([weights("normal", 128, 8, seed) for seed in range(6)])
    one = np.stack([solved(x, HQQ()) for x in w])
    many = solved(w.reshape(2, 3, 128, 8), HQQ())
    np.testing.assert_array_equal(many.reshape(one.shape), one)


def test_size_of_the_weights_does_not_matter():
    """The reference crushes groups narrower than 1e-4 to a constant."""
    w = weights("normal")
    small = solved(w * np.float32(2**-12), HQQ())
    np.testing.assert_allclose(small * 2**12, solved(w, HQQ()), rtol=1e-6, atol=1e-9)


def test_extremes():
    w = weights("normal", 128, 4)
    w[:, 0], w[:, 1] = 0, 0.37
    w[:64, 2] = 1e-3
    w[5, 2] = 3e38
    w[7, 3] = np.nan
    q = solved(w, HQQ())
    np.testing.assert_array_equal(q[:, 0], 0)
    np.testing.assert_allclose(q[:, 1], 0.37, rtol=1e-6)
    assert np.isfinite(q[:, 2]).all()
    assert np.isnan(q[:64, 3]).all() and np.isfinite(q[64:, 3]).all()


def test_bits_are_counted():
    coded = jax.eval_shape(
        HQQ(bits=3).solve, jax.ShapeDtypeStruct((256, 96), "float32")
    )
    assert coded[0].bits_per_weight == 3 + 2 * 32 / 64
