import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.core.coded import Coded, encode, fake_quantize, pack_codes
from qjax.core.formats import (
    MSE,
    MX,
    AbsMax,
    Binary,
    Codebook,
    Float,
    Granularity,
    Grid,
    Int,
    MinMax,
    Percentile,
    Ternary,
    channel,
    group,
)
from qjax.core.rounding import divide, round_ste, round_stochastic

W = np.random.default_rng(0).normal(size=(48, 5)).astype(np.float32)


def scale_of(format, **options) -> np.ndarray:
    fit = jax.jit(lambda w: format.fit(w, **options).scale)
    return np.asarray(fit(jnp.asarray(W)))


def coded(format, w: np.ndarray = W) -> Coded:
    return jax.jit(lambda w: encode(w, format))(jnp.asarray(w))


@pytest.mark.parametrize(
    ("rule", "divisor"), [("ct", 7.5), ("narrow", 7.0), ("signed", 8.0)]
)
def test_symmetric_scale_rules(rule, divisor):
    scale = scale_of(Int(4, channel(), scale_rule=rule))[0]
    largest = W[np.abs(W).argmax(0), np.arange(5)]
    expected = np.abs(largest) / np.float32(divisor)
    if rule == "signed":
        expected = -largest / np.float32(divisor)
        assert (expected < 0).any()
    np.testing.assert_array_equal(scale, expected)


def test_signed_rule_gives_the_largest_weight_the_lowest_code():
    codes = coded(Int(4, channel(), scale_rule="signed")).unpack()
    np.testing.assert_array_equal(codes[np.abs(W).argmax(0), np.arange(5)], 0)


def test_division_is_correctly_rounded_under_jit():
    x = np.abs(W).ravel()
    y = np.float32(7.5)
    np.testing.assert_array_equal(
        jax.jit(lambda x: divide(x, y))(jnp.asarray(x)), x / y
    )
    assert np.isnan(divide(jnp.float32(np.nan), 2.0))


def test_percentile_is_numpys_also_in_a_partial_group():
    scale = scale_of(Int(4, group(32), symmetric=False), search=Percentile(90.0))
    for g, rows in enumerate((slice(0, 32), slice(32, 48))):
        high = np.maximum(np.percentile(W[rows], 90, axis=0), 0)
        low = np.minimum(np.percentile(W[rows], 10, axis=0), 0)
        np.testing.assert_allclose(scale[g], (high - low) / 15, rtol=1e-5)
    absolute = scale_of(Int(4, channel()), search=Percentile(75.0))[0]
    np.testing.assert_allclose(
        absolute, np.percentile(np.abs(W), 75, axis=0) / 7.5, rtol=1e-5
    )


def test_absmax_makes_an_asymmetric_range_symmetric():
    scale = scale_of(Int(4, channel(), symmetric=False), search=AbsMax())[0]
    np.testing.assert_allclose(scale, 2 * np.abs(W).max(0) / 15, rtol=1e-6)


@pytest.mark.parametrize("power", [-90, 90])
def test_mse_search_does_not_depend_on_magnitude(power):
    format, factor = Int(3, group(16)), np.float32(2.0**power)
    fit = jax.jit(lambda w: format.fit(w, MSE()).scale)
    np.testing.assert_array_equal(fit(jnp.asarray(W * factor)), fit(W) * factor)
    assert (fit(W) != scale_of(format)).any()


def test_scales_below_the_smallest_number_are_raised_to_it():
    counts = np.random.default_rng(1).integers(-40, 41, (48, 5))
    for dtype, unit in ((jnp.float16, 2.0**-24), (jnp.float32, 2.0**-126)):
        w = (counts * unit).astype(dtype)
        part = coded(Int(8), w)
        np.testing.assert_array_equal(part.scale.astype(jnp.float32), unit)
        np.testing.assert_array_equal(part.decode(dtype), w)
    zeros = coded(Int(8), np.zeros((48, 5), np.float32))
    np.testing.assert_array_equal(zeros.scale, np.finfo(np.float32).eps)


@pytest.mark.parametrize("weighted", [False, True])
def test_mse_search_is_brute_force(weighted):
    importance = np.linspace(0.1, 3, 48).astype(np.float32) if weighted else np.ones(48)
    search = MSE(norm=2.0, grid=20, maxshrink=0.5)
    options = {"importance": jnp.asarray(importance, jnp.float32)} if weighted else {}
    scale = scale_of(Int(3, channel()), search=search, **options)[0]
    for column, found in zip(W.T.astype(np.float64), scale, strict=True):
        whole = np.abs(column).max() / 3.5

        def error(s, column=column):
            kept = np.clip(np.round(column / s), -4, 3) * s
            return (importance * (column - kept) ** 2).sum()

        errors = [error(whole * (1 - i / 20)) for i in range(10)]
        assert error(np.float64(found)) <= min(errors) * (1 + 1e-5)


def test_binary_and_ternary_scales_are_means():
    mean = np.abs(W).mean(0)
    np.testing.assert_allclose(scale_of(Binary())[0], mean, rtol=1e-6)
    np.testing.assert_allclose(scale_of(Ternary())[0], mean, rtol=1e-6)
    q = np.clip(np.round(W / mean), -1, 1)
    np.testing.assert_array_equal(coded(Ternary()).unpack(), q + 2)


def test_scale_dtype_is_the_weights_own_or_the_named_one():
    half = W.astype(jnp.bfloat16)
    assert coded(Int(4), half).scale.dtype == jnp.bfloat16
    named = coded(Int(4, channel(), scale_dtype="float32"), half)
    assert named.scale.dtype == jnp.float32


def test_fake_quantize_passes_the_gradient():
    w, format = jnp.asarray(W), Int(3, group(16))
    fake = jax.jit(lambda w: fake_quantize(w, format))
    np.testing.assert_array_equal(fake(w), coded(format).decode())
    slope = jax.grad(lambda w: (fake(w) * 3).sum())(w)
    np.testing.assert_array_equal(slope, 3)
    np.testing.assert_array_equal(jax.grad(lambda x: round_ste(x).sum())(w), 1)


def test_stochastic_rounding_is_unbiased_and_needs_a_key():
    x = jnp.full(20000, 2.3)
    drawn = round_stochastic(x, jax.random.key(1))
    assert set(np.unique(drawn)) == {2.0, 3.0}
    assert float(drawn.mean()) == pytest.approx(2.3, abs=5 * 0.46 / np.sqrt(20000))
    with pytest.raises(ValueError, match='rounding="stochastic" needs a key'):
        encode(jnp.asarray(W), Int(4), rounding="stochastic")
    with pytest.raises(ValueError, match="rounding is 'up'"):
        encode(jnp.asarray(W), Int(4), rounding="up")


def untyped(kind: type, **fields) -> None:
    """A format's own checks, without those of annotations that run under pytest."""
    format = object.__new__(kind)
    for name, value in fields.items():
        object.__setattr__(format, name, value)
    format.__post_init__()


BAD = [
    (lambda: Int(9), "Int.bits is 9; it must be a whole number from 1 to 8"),
    (lambda: untyped(Int, bits=4.0), r"Int.bits is 4\.0; it must be a whole number"),
    (lambda: Int(True), "Int.bits is True; it must be a whole number"),
    (lambda: Int(1), r"Int\(bits=1, symmetric=True\)"),
    (
        lambda: Int(4, symmetric=True, zero="int"),
        "zero is 'int' with symmetric=True",
    ),
    (lambda: Int(4, zero="floaty"), "Int.zero is 'floaty'"),
    (lambda: Int(4, scale_rule="max"), "Int.scale_rule is 'max'"),
    (lambda: Int(4, zero="int", scale_rule="narrow"), "only symmetric grids"),
    (lambda: Int(4, scale_dtype="int8"), "Int.scale_dtype is 'int8'"),
    (lambda: Float("e3m4"), "Float.dtype is 'e3m4'"),
    (lambda: MX("fp5"), "MX.element is 'fp5'"),
    (lambda: MX(scale_rule="floor"), "MX.scale_rule is 'floor'"),
    (lambda: Codebook("nf3"), "Codebook.levels is 'nf3'"),
    (lambda: Codebook((1.0,)), "Codebook.levels has 1 levels"),
    (lambda: Codebook((0.0, 0.0)), "one must differ from zero"),
    (lambda: Codebook(None), "learned levels need 1 to 8 bits"),
    (
        lambda: untyped(Codebook, levels=None, bits=3.0),
        r"Codebook.bits is 3\.0; learned levels need",
    ),
    (lambda: Codebook("nf4", bits=3), "16 levels take 4 bits"),
    (lambda: Codebook(double_quant=0), "Codebook.double_quant is 0"),
    (lambda: untyped(Codebook, double_quant=256.0), r"Codebook.double_quant is 256\.0"),
    (lambda: Granularity(0, 1), "Granularity.rows is 0"),
    (lambda: group(True), "Granularity.rows is True"),
    (lambda: Percentile(40.0), "Percentile.p is 40.0"),
    (lambda: MSE(norm=0), "MSE.norm is 0"),
    (lambda: MSE(grid=0), "MSE.grid is 0"),
    (lambda: MSE(maxshrink=1.5), "MSE.maxshrink is 1.5"),
    (lambda: Int(4).fit(jnp.asarray(W), MinMax(), jnp.ones(48)), "importance needs"),
    (lambda: Binary().fit(jnp.asarray(W), MSE()), "Binary has no range to search"),
    (
        lambda: pack_codes(jnp.zeros((4, 5), jnp.uint8), Grid(W[:1]), Int(4), (48, 5)),
        r"codes have shape \(4, 5\)",
    ),
    (
        lambda: pack_codes(jnp.zeros((48, 5), jnp.uint8), Grid(W), Int(4), (48, 5)),
        r"grid.scale has shape \(48, 5\)",
    ),
    (lambda: coded(Int(4))[0], "has leading axes"),
]


@pytest.mark.parametrize(("call", "message"), BAD, ids=[m for _, m in BAD])
def test_bad_input_is_named(call, message):
    with pytest.raises((ValueError, IndexError), match=message):
        call()
