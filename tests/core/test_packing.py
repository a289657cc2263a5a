import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qjax.core.packing import pack, unpack, words_for


def words_of(codes: list[int], bits: int) -> list[int]:
    """The stream as one big Python integer, cut into 32-bit words."""
    stream = sum(code << (i * bits) for i, code in enumerate(codes))
    count = -(-len(codes) * bits // 32)
    return [(stream >> (32 * i)) & 0xFFFFFFFF for i in range(count)]


@pytest.mark.parametrize("bits", range(1, 8))
@settings(max_examples=4, deadline=None)
@given(data=st.data())
def test_words_are_the_bit_stream(bits, data):
    # Two lengths, so that few shapes are compiled; both leave a partial word or unit.
    length = data.draw(st.sampled_from([37, 64]))
    codes = data.draw(
        st.lists(st.integers(0, 2**bits - 1), min_size=length, max_size=length)
    )
    column = jnp.asarray(codes, jnp.uint8)[:, None]
    packed = jax.jit(pack, static_argnums=1)(column, bits)
    assert packed.dtype == jnp.uint32
    assert packed[:, 0].tolist() == words_of(codes, bits)
    back = jax.jit(unpack, static_argnums=(1, 2))(packed, bits, length)
    np.testing.assert_array_equal(back, column)


@pytest.mark.parametrize("bits", [2, 3, 6])
@pytest.mark.parametrize("axis", [-2, -1])
def test_axes_and_leading_axes(bits, axis, strict):
    codes = np.random.default_rng(0).integers(0, 2**bits, (2, 21, 13)).astype(np.uint8)
    length = codes.shape[axis]
    packed = pack(jnp.asarray(codes), bits, axis)
    assert packed.shape[axis] == words_for(length, bits)
    np.testing.assert_array_equal(unpack(packed, bits, length, axis), codes)
    one = np.moveaxis(codes[1], axis, 0)[:, 4].tolist()
    words = np.moveaxis(np.asarray(packed[1]), axis, 0)[:, 4].tolist()
    assert words == words_of(one, bits)


def test_bad_input_is_named():
    codes = jnp.zeros((8, 2), jnp.uint8)
    with pytest.raises(ValueError, match="bits is 8; packed codes have 1 to 7 bits"):
        pack(codes, 8)
    with pytest.raises(ValueError, match="9 codes of 4 bits fill 2 words; got 1"):
        unpack(pack(codes, 4), 4, 9)
