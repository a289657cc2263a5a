from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from qjax.core import minifloat
from qjax.core.rounding import round_nearest, round_stochastic

pytestmark = pytest.mark.optimized

TYPES = {
    "E2M1": ml_dtypes.float4_e2m1fn,
    "E2M3": ml_dtypes.float6_e2m3fn,
    "E3M2": ml_dtypes.float6_e3m2fn,
    "E4M3": ml_dtypes.float8_e4m3fn,
    "E5M2": ml_dtypes.float8_e5m2,
    "E4M3B11": ml_dtypes.float8_e4m3b11fnuz,
}


@pytest.mark.parametrize("name", TYPES)
def test_every_code_is_ml_dtypes(name, strict):
    element = getattr(minifloat, name)
    patterns = np.arange(2**element.bits, dtype=np.uint8)
    expected = patterns.view(TYPES[name]).astype(np.float32)
    np.testing.assert_array_equal(element.decode(jnp.asarray(patterns)), expected)
    assert element.largest == float(ml_dtypes.finfo(TYPES[name]).max)


@pytest.mark.parametrize("name", TYPES)
def test_nearest_is_ml_dtypes_and_saturates(name, strict):
    element = getattr(minifloat, name)
    codes = np.arange(2 ** (element.bits - 1), dtype=np.uint8).view(TYPES[name])
    levels = codes.astype(np.float32)
    levels = levels[np.isfinite(levels)]
    ties = (levels[1:] + levels[:-1]) / 2
    rng = np.random.default_rng(0)
    spread = rng.normal(size=4000) * np.exp2(rng.uniform(-12, 6, size=4000))
    x = np.concatenate([levels, ties, np.nextafter(ties, 0), -ties, spread, [1e9]])
    x = x.astype(np.float32)
    held = np.clip(x, -element.largest, element.largest)
    expected = held.astype(TYPES[name]).view(np.uint8)
    found = jax.jit(lambda x: element.encode(x, round_nearest))(x)
    np.testing.assert_array_equal(found, expected)
    elements = minifloat.to_elements(jnp.asarray(x), element, round_nearest)
    np.testing.assert_array_equal(np.asarray(elements).view(np.uint8), expected)


@pytest.mark.parametrize("name", ["E2M1", "E4M3"])
def test_stochastic_takes_the_two_neighbours_without_bias(name):
    element = getattr(minifloat, name)
    x = np.float32([0.3, 1.2, -2.6, 0.05])

    def draw(key):
        to_whole = partial(round_stochastic, key=key)
        return element.decode(element.encode(jnp.asarray(x), to_whole))

    drawn = np.asarray(
        jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), 4096))
    )
    for column, value in zip(drawn.T, x, strict=True):
        step = np.ptp(column)
        assert len(np.unique(column)) == 2
        assert column.min() < value < column.max()
        # Five standard errors of a two-valued mean.
        assert abs(column.mean() - value) < 5 * 0.5 * step / np.sqrt(4096)


def test_powers_and_logarithms_are_exact():
    exponents = np.arange(-126, 128)
    powers = np.ldexp(np.float32(1), exponents)
    np.testing.assert_array_equal(
        minifloat.power_of_two(jnp.asarray(exponents)), powers
    )
    below = np.nextafter(powers[1:], 0)
    np.testing.assert_array_equal(minifloat.floor_log2(jnp.asarray(powers)), exponents)
    np.testing.assert_array_equal(
        minifloat.floor_log2(jnp.asarray(below)), exponents[:-1]
    )
