"""Products with coded floats, simulated strictly, against float64."""

import re
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from qjax.core.packing import pack
from qjax_kernels.float_matmul import FloatWeight, decode, reference
from qjax_kernels.float_matmul.weight import FLOAT8
from qjax_kernels.scaled import Blocks

SUMS = Blocks(8, 128, 256)
WEIGHTS = Blocks(8, 256, 256, tile=128, chunk=256, scale_on="weights")


@dataclass(frozen=True)
class Case:
    element: str
    group: int | None
    scale: str = "float32"
    blocks: Blocks = SUMS
    coded: bool = False
    M: int = 16
    K: int = 512
    N: int = 256

    @property
    def id(self):
        kind = "a8" if self.coded else self.blocks.scale_on
        return f"{self.element}-g{self.group}-{kind}-{self.M}x{self.K}x{self.N}"


CASES = [
    Case("e4m3", None),
    Case("e4m3", 128),
    Case("e4m3", 32, "float8_e8m0fnu", WEIGHTS),
    Case("e5m2", None),
    Case("e4m3", None, coded=True),
    Case("e4m3", 128, coded=True),
    Case("e2m1", 32, "float8_e8m0fnu"),
    Case("e2m1", 32, "float8_e8m0fnu", WEIGHTS),
    Case("e2m1", 16, "float8_e4m3fn"),
    Case("e2m1", 16, "float8_e4m3fn", WEIGHTS),
    Case("e4m3b11", None, K=256, N=128),
    Case("e5m2", None, coded=True, K=256, N=128),
    Case("e5m2", 32, "float8_e8m0fnu", WEIGHTS, K=256),
    Case("e4m3", None, blocks=Blocks(64, 128, 256), M=64, K=256, N=128),
    # Nothing is a multiple of anything.
    Case("e4m3", None, M=5, K=76, N=130),
    Case("e2m1", 32, "float8_e8m0fnu", M=3, K=320, N=140),
    Case("e2m1", 16, "float8_e4m3fn", M=1, K=200, N=1),
]


def drawn(case, seed=0):
    """A weight of random codes, extreme scales among them, and `w` in float64."""
    draw = np.random.default_rng(seed)
    groups = -(-case.K // (case.group or case.K))
    patterns = draw.integers(0, 16, (case.K, case.N)).astype(np.uint8)
    if case.element == "e2m1":
        values = patterns.view(ml_dtypes.float4_e2m1fn).astype(np.float64)
        codes = pack(jnp.asarray(patterns), 4)
    else:
        bits = draw.integers(0, 256, (case.K, case.N)).astype(np.uint8)
        codes = bits.view(FLOAT8[case.element])
        finite = np.isfinite(codes.astype(np.float64))
        zero = 0 if case.element == "e4m3b11" else 0x80  # no format but it has -0
        codes = np.where(finite, bits, zero).astype(np.uint8).view(codes.dtype)
        values = codes.astype(np.float64)
        codes = jnp.asarray(codes)
    scale = draw.uniform(0.5, 2, (groups, case.N)) * 10.0 ** draw.integers(
        -6, 6, case.N
    )
    if case.scale == "float8_e8m0fnu":
        scale = 2.0 ** draw.integers(-40, 40, (groups, case.N))
    if case.scale == "float8_e4m3fn":
        scale = draw.uniform(2**-9, 448, (groups, case.N))
    scale = scale.astype(FLOAT_SCALES[case.scale])
    two_levels = np.float32([[2688 / 3e-3]]) if case.group == 16 else None
    weight = FloatWeight(
        codes, jnp.asarray(scale), two_levels, case.element, case.group, case.K
    )
    each = scale.astype(np.float64)
    each = each if two_levels is None else each / np.float64(two_levels)
    each = np.repeat(each, case.group or case.K, 0)[: case.K]
    return weight, values * each


FLOAT_SCALES = {
    "float32": np.float32,
    "float8_e8m0fnu": jnp.float8_e8m0fnu,
    "float8_e4m3fn": jnp.float8_e4m3fn,
}


def tokens(case, seed=1):
    x = jax.random.normal(jax.random.key(seed), (case.M, case.K), jnp.bfloat16)
    if not case.coded:
        return x, None
    scale = jnp.linspace(1e-3, 10, case.M)[:, None]
    return (100 * x).astype(FLOAT8[case.element]), scale


def product(backend, x, weight, case, x_scale=None):
    return backend.run(
        "float_matmul", x, weight, x_scale=x_scale, dtype=jnp.float32,
        tpu={"blocks": case.blocks},
    )  # fmt: skip


def exact(x, x_scale, w):
    """The product in float64, and what summing its K terms in float32 may err by."""
    x = np.asarray(x, np.float64)
    x = x if x_scale is None else x * np.asarray(x_scale, np.float64)
    K = len(w)
    return x @ w, 2.0**-24 * (K + 8) * (np.abs(x) @ np.abs(w))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_equals_float64(case, backend):
    weight, w = drawn(case)
    x, x_scale = tokens(case)
    y = np.asarray(product(backend, x, weight, case, x_scale), np.float64)
    true, bound = exact(x, x_scale, w)
    assert np.isfinite(y).all()
    # A power of two, or e4m3 times e2m1, is exact in bfloat16, so that scales on
    # weights round nothing either.
    assert (np.abs(y - true) <= bound).all()


@pytest.mark.parametrize("case", [CASES[0], CASES[4], CASES[8]], ids=lambda c: c.id)
def test_the_reference_equals_float64(case):
    weight, w = drawn(case)
    x, x_scale = tokens(case)
    y = reference.float_matmul(x, weight, x_scale=x_scale, dtype=jnp.float32)
    true, bound = exact(x, x_scale, w)
    assert (np.abs(np.asarray(y, np.float64) - true) <= bound).all()


@pytest.mark.parametrize(
    ("generation", "case"),
    [
        ("v6e", CASES[4]),
        ("v7x", CASES[4]),
        ("v7x", Case("e2m1", 32, "float8_e8m0fnu", K=256, N=128)),
        ("v7x", Case("e2m1", 16, "float8_e4m3fn", WEIGHTS, K=256)),
    ],
    ids=lambda v: v if isinstance(v, str) else v.id,
)
def test_other_generations_mean_the_same(generation, case, backend):
    """Of float8 tokens; and v7x converts e2m1 by itself."""
    weight, w = drawn(case)
    x, x_scale = tokens(case)
    y = product(backend.simulating(generation), x, weight, case, x_scale)
    true, bound = exact(x, x_scale, w)
    assert (np.abs(np.asarray(y, np.float64) - true) <= bound).all()


def test_e4m3_is_sixteen_times_e4m3b11_but_for_zeros_sign():
    every = np.arange(256).astype(np.uint8)
    words = decode.unsigned_zero(jnp.asarray(every.view(np.uint32)))
    same = np.asarray(words).view(np.uint8).view(FLOAT8["e4m3b11"]).astype(np.float64)
    true = every.view(FLOAT8["e4m3"]).astype(np.float64)
    finite = np.isfinite(true)
    np.testing.assert_array_equal(same[finite] * decode.E4M3_IN_B11, true[finite])
    assert np.isfinite(same).all()


@pytest.mark.parametrize(
    "case", [CASES[0], CASES[4], CASES[6], CASES[9]], ids=lambda c: c.id
)
def test_extreme_scales_and_zeros_stay_finite(case, backend):
    """Scales at the ends of their types, tokens and groups of zeros."""
    weight, _ = drawn(case)
    ends = np.asarray(weight.scale).copy()
    kind = ends.dtype
    low, high = {1: (2.0**-126, 2.0**120), 4: (1e-38, 1e33)}[kind.itemsize]
    high = 1e28 if case.coded else high  # sums of coded tokens reach 1e8
    if kind == np.dtype(jnp.float8_e4m3fn):
        low, high = 2.0**-9, 448
    ends[:, 0], ends[:, 1] = np.asarray(low, kind), np.asarray(high, kind)
    codes = np.asarray(weight.codes).copy()
    in_group = len(codes) * (case.group or case.K) // case.K
    codes[:in_group] = codes[:, 2] = np.zeros((), codes.dtype)
    weight = replace(weight, codes=jnp.asarray(codes), scale=jnp.asarray(ends))
    x, x_scale = tokens(case)
    x_scale = x_scale if x_scale is None else x_scale.at[1].set(1e-38)
    x = x.at[0].set(0)
    y = np.asarray(product(backend, x, weight, case, x_scale))
    assert np.isfinite(y).all()
    assert (y[0] == 0).all() and (y[:, 2] == 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"element": "e3m4"}, "FloatWeight.element is 'e3m4'"),
        ({"group": 64}, "FloatWeight.scale is float32"),
        ({"K": 500}, "FloatWeight.codes is float8_e4m3fn"),
    ],
)
def test_what_does_not_agree_is_named(change, message):
    weight = replace(drawn(CASES[0])[0], **change)
    with pytest.raises(ValueError, match=re.escape(message)):
        reference.float_matmul(jnp.ones((2, 512)), weight)
