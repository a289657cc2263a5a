"""Packing for a GPU's matrix unit: nothing is lost, and the order is the hardware's."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.mosaic.gpu import fragmented_array

from qjax_kernels.int_matmul.fragments import (
    BITS,
    BOTH,
    INPUTS,
    OUTPUTS,
    PAIRS,
    THREADS,
    pack_tiles,
    pieces,
    positions,
    unpack_tiles,
    words_each,
)


def drawn(bits, *shape):
    draw = np.random.default_rng(bits)
    half = 2 ** (bits - 1)
    if bits == 8:
        return jnp.asarray(draw.integers(-half, half, shape), jnp.int8)
    return jnp.asarray(draw.integers(0, 2 * half, shape), jnp.uint8)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(256, 128), (2, 200, 130)], ids=str)
def test_unpacking_gives_back_the_codes(bits, shape):
    codes = drawn(bits, *shape)
    back = unpack_tiles(pack_tiles(codes, bits), bits, *shape[-2:])
    assert back.dtype == codes.dtype
    np.testing.assert_array_equal(back, codes)


@pytest.mark.parametrize("bits", BITS)
def test_packed_codes_are_as_many_bytes(bits):
    words = pack_tiles(drawn(bits, 256, 128), bits)
    assert words.shape == (2, 2, 2 * bits, 128)
    assert words.size * 32 == 256 * 128 * bits


@pytest.mark.parametrize("bits", BITS)
def test_every_bit_of_a_thread_s_words_is_used_once(bits):
    used = np.zeros((words_each(bits), 32), int)
    for parts in pieces(bits):
        assert sum(mask for _, _, mask in parts) == 2 ** (8 if bits == 8 else bits) - 1
        for word, shift, mask in parts:
            for bit in range(32):
                used[word, bit] += (mask * BOTH << shift) >> bit & 1
    assert len(pieces(bits)) == PAIRS
    assert (used == 1).all()


def test_the_order_is_that_of_mosaic_s_layout_for_the_left_operand():
    layout = fragmented_array.WGMMA_LAYOUT
    tiled = np.arange(OUTPUTS * INPUTS).reshape(OUTPUTS, INPUTS)
    for tile in layout.tiling.tiles:
        outer = tiled.shape[: tiled.ndim - len(tile)]
        inner = tiled.shape[tiled.ndim - len(tile) :]
        cut = [part for size, t in zip(inner, tile) for part in (size // t, t)]
        tiled = tiled.reshape(*outer, *cut)
        first = len(outer)
        order = [first + 2 * i for i in range(len(tile))]
        order += [first + 2 * i + 1 for i in range(len(tile))]
        tiled = tiled.transpose(*range(first), *order)
    named = [*layout.warp_dims, *layout.lane_dims, layout.vector_dim]
    moved = np.moveaxis(tiled, named, range(-len(named), 0))
    threads = moved.reshape(-1, THREADS, 2)  # register, thread, half
    steps = np.arange(PAIRS).reshape(-1, 2, 2)  # step, half of the inputs, of the rows
    np.testing.assert_array_equal(
        threads.transpose(1, 0, 2), positions()[:, steps.reshape(-1)]
    )
