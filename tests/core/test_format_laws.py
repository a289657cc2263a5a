"""Laws that every number format obeys, on one small shape with partial groups."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qjax.core.coded import encode
from qjax.core.double_quant import DoubleQuantized
from qjax.core.formats import (
    MX,
    NVFP4,
    Binary,
    Codebook,
    Float,
    Int,
    Ternary,
    block,
    channel,
    group,
    tensor,
)

K, N = 40, 6
FORMATS = [
    Int(2, group(16)),
    Int(3, channel(), scale_rule="narrow"),
    Int(4, group(16), symmetric=False),
    Int(4, block(16, 4), scale_rule="signed"),
    Int(5, group(16), zero="float"),
    Int(6, tensor()),
    Int(8, channel(), symmetric=False),
    Float("e4m3", channel()),
    Float("e5m2", block(16, 4)),
    MX("fp4"),
    MX("fp6_e2m3", scale_rule="ct"),
    MX("fp8"),
    NVFP4(),
    Codebook("nf4", group(16)),
    Codebook("nf4", group(16), double_quant=256),
    Codebook((-1.0, 0.0, 0.25, 2.0, 0.5), channel()),
    Binary(group(16)),
    Ternary(channel()),
]
IDS = [f.name for f in FORMATS]
each_format = pytest.mark.parametrize("format", FORMATS, ids=IDS)
some = settings(max_examples=8, deadline=None)
seeds = st.integers(0, 2**32 - 1)


@cache
def roundtrip(format):
    """`w` to codes, codes of the decoded weights on the same grid, decoded weights."""

    def run(w):
        with jax.numpy_dtype_promotion("strict"):
            part = encode(w, format)
            decoded = part.decode()
            again = format.to_codes(decoded, part.grid())
            return part, part.unpack(), again, decoded, encode(decoded, format).decode()

    return jax.jit(run)


@cache
def decoded(format):
    return lambda w: np.asarray(roundtrip(format)(jnp.asarray(w))[3])


def draw(seed: int, scale: float = 1.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(K, N)) * scale).astype(np.float32)


def is_double(format) -> bool:
    return isinstance(format, Codebook) and format.double_quant is not None


def blocks(format) -> np.ndarray:
    """The number of the block of each weight, `[K, N]`."""
    rows, cols = format.granularity.block(K, N)
    down, across = np.arange(K) // rows, np.arange(N) // cols
    return down[:, None] * N + across[None, :]


@each_format
@some
@given(seed=seeds)
def test_decoded_weights_are_representable(format, seed):
    """Coding decoded weights again on their own grid changes no value."""
    part, _, again, values, _ = roundtrip(format)(draw(seed))
    back = format.from_codes(again, part.grid())
    np.testing.assert_allclose(back, values, rtol=1e-6, atol=1e-12)


@each_format
@some
@given(seed=seeds)
def test_idempotent(format, seed):
    """Encoding twice equals encoding once.

    Exceptions, where the decoded weights have another range: the "ct" rule of symmetric
    integers, whose ends the largest weight does not reach; double quantization, whose
    scales are rounded after the codes were found; Ternary, whose scale is a mean that
    rounding moves.
    """
    ct = isinstance(format, Int) and format.symmetric and format.scale_rule == "ct"
    if ct or is_double(format) or isinstance(format, Ternary):
        return
    *_, once, twice = roundtrip(format)(draw(seed))
    np.testing.assert_allclose(twice, once, rtol=2e-6, atol=1e-6)


@each_format
@some
@given(seed=seeds)
def test_monotonic_within_a_block(format, seed):
    w = draw(seed)
    values = decoded(format)(w)
    number = blocks(format)
    for b in np.unique(number):
        order = np.argsort(w[number == b])
        assert (np.diff(values[number == b][order]) >= 0).all()


@each_format
@some
@given(seed=seeds)
def test_permuting_columns_permutes_the_result(format, seed):
    if format.granularity.cols not in (1, None) or is_double(format):
        return  # wider blocks mix columns, and so do shared second scales
    w = draw(seed)
    order = np.random.default_rng(seed).permutation(N)
    whole = decoded(format)(w)
    np.testing.assert_array_equal(decoded(format)(w[:, order]), whole[:, order])


@each_format
@some
@given(seed=seeds)
def test_permuting_groups_permutes_the_result(format, seed):
    rows = format.granularity.rows
    if rows is None or is_double(format):
        return
    full = K // rows * rows
    groups = np.random.default_rng(seed).permutation(K // rows)
    order = np.concatenate([g * rows + np.arange(rows) for g in groups])
    order = np.concatenate([order, np.arange(full, K)])
    w = draw(seed)
    np.testing.assert_array_equal(decoded(format)(w[order]), decoded(format)(w)[order])


@each_format
@some
@given(seed=seeds, power=st.integers(-100, 120))
def test_powers_of_two_scale_through(format, seed, power):
    w = draw(seed)
    factor = np.float32(2.0**power)
    scaled = decoded(format)(w * factor) / factor
    np.testing.assert_allclose(scaled, decoded(format)(w), rtol=1e-6, atol=1e-7)


@each_format
def test_extremes(format):
    zero = decoded(format)(np.zeros((K, N), np.float32))
    np.testing.assert_array_equal(zero, 0)
    outlier = draw(2)
    outlier[3, 2] = 1e4
    assert np.isfinite(decoded(format)(outlier)).all()
    same = decoded(format)(np.full((K, N), 0.7, np.float32))
    assert len(np.unique(same)) <= 2  # the partial block of a codebook may differ
    np.testing.assert_allclose(same, 0.7, rtol=0.34)


@each_format
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=lambda d: d.__name__)
def test_error_does_not_depend_on_magnitude(format, dtype):
    """From near the smallest to near the largest number of the dtype."""

    def error(size):
        exact = draw(1).astype(np.float64)
        w = (exact * (size / np.abs(exact).max())).astype(dtype)
        values = decoded(format)(w).astype(dtype)
        assert np.isfinite(values.astype(np.float32)).all()
        w, values = w.astype(np.float64) / size, values.astype(np.float64) / size
        return np.linalg.norm(values - w) / np.linalg.norm(w)

    usual = error(1.0)
    assert usual < 0.75
    for size in (1e-36, 1e-30, 1e30, 1e36, 2e38, 3.3e38):
        assert error(size) < usual + 0.01


@each_format
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_visible(format, bad):
    w = draw(3)
    w[20, 4] = bad
    values = decoded(format)(w)
    hit = blocks(format) == blocks(format)[20, 4]
    assert np.isnan(values[hit]).all()
    if not is_double(format) and not isinstance(format, NVFP4):
        assert np.isfinite(values[~hit]).all()  # those two share a second scale


@each_format
def test_leading_axes_equal_vmap_and_nbytes_counts_all(format):
    w = jnp.asarray(np.stack([draw(4), draw(5)])[:, None])
    together = jax.jit(lambda w: encode(w, format))(w)
    assert together.lead == (2, 1)
    for i in range(2):
        one = roundtrip(format)(w[i, 0])[0]
        for a, b in zip(
            jax.tree.leaves(together[i, 0]), jax.tree.leaves(one), strict=True
        ):
            np.testing.assert_allclose(
                a.astype(jnp.float32), b.astype(jnp.float32), rtol=1e-6
            )
    Gk, Gn = format.granularity.counts(K, N)
    words = -(-K * format.bits // 32) * 4 * N if format.bits < 8 else K * N
    narrow = isinstance(format, MX | NVFP4)
    expected = words + Gk * Gn * (1 if narrow else 4)
    if isinstance(format, NVFP4):
        expected += 4
    if isinstance(format, Int) and format.zero == "int":
        zero = Gn if format.bits == 8 else -(-Gn * format.bits // 32) * 4
        expected += Gk * zero
    if isinstance(format, Int) and format.zero == "float":
        expected += Gk * Gn * 4
    if is_double(format):
        assert isinstance(together.scale, DoubleQuantized)
        expected += Gk * Gn - 4 * Gk * Gn + 4 * (-(-Gk * Gn // 256)) + 4
    assert together.nbytes == 2 * expected
    assert together.bits_per_weight == pytest.approx(8 * expected / (K * N))


@pytest.mark.parametrize(
    "format",
    [Int(4, group(16), symmetric=False), NVFP4()],
    ids=lambda f: f.name,
)
def test_strict_types_bf16_and_eager_equals_jit(format, strict):
    w = jnp.asarray(draw(6), jnp.bfloat16)
    eager = encode(w, format)
    compiled = jax.jit(lambda w: encode(w, format))(w)
    for a, b in zip(jax.tree.leaves(eager), jax.tree.leaves(compiled), strict=True):
        np.testing.assert_array_equal(a, b)
    assert eager.decode(jnp.bfloat16).dtype == jnp.bfloat16
    in_float = format.from_codes(eager.unpack(), eager.grid())
    np.testing.assert_array_equal(eager.decode(), in_float)


@pytest.mark.parametrize("sigma", [1.0, 1e-2, 1e-4, 1e-6])
def test_nvfp4_error_does_not_depend_on_magnitude(sigma):
    w = draw(7)
    errors = [
        np.linalg.norm(decoded(NVFP4())(w * np.float32(s)) / s - w) / np.linalg.norm(w)
        for s in (1.0, sigma)
    ]
    assert errors[1] == pytest.approx(errors[0], rel=0.02)
    assert errors[0] < 0.11
