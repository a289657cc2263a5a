"""Words to bfloat16 in registers, on a Hopper GPU: exact, three instructions a pair.

A field in the mantissa of 128.0 is `128 + u`, a bfloat16 as it stands; what is too much
is subtracted before anything is multiplied, so that products see `q` itself. A code of
8 bits does not fit: its lower 7 go there, and its sign into the exponent of what is
subtracted, 128 or 256.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector

from qjax_kernels.int_matmul.fragments import (
    BOTH,
    OUTPUTS,
    THREADS,
    pieces,
    read_at_once,
    words_each,
)

BFLOAT16_128 = 0x43004300
SIGN = 0x80


def words_layout(bits: int) -> Any:
    """How a tile of words is read from shared memory."""
    return plgpu.Layout.WG_STRIDED(
        (words_each(bits), THREADS), vec_size=read_at_once(bits)
    )


def decode(words: Any, bits: int, first: int, inputs: int) -> jax.Array:
    """`q[64, inputs]` in bfloat16 from input `first` of a tile on.

    Args:
      words: the tile, loaded with `words_layout`.
      bits: of a code.
      first: a multiple of 16.
      inputs: a multiple of 16.
    """
    wgmma = plgpu.Layout.WGMMA
    out = plgpu.ShapeDtypeStruct((OUTPUTS, inputs), jnp.bfloat16, layout=wgmma)

    def decoded(_: Any, given: Any) -> Any:
        at_once = read_at_once(bits)
        thread = [
            vector.extract(given.registers[i // at_once], [], [i % at_once])
            for i in range(words_each(bits))
        ]
        layout = mgpu.WGMMA_LAYOUT
        found = np.empty(layout.registers_shape((OUTPUTS, inputs)), dtype=object)
        for index, _empty in np.ndenumerate(found):
            step, register = index[1] // 2, index[1] % 2 * 2 + index[4]
            pair = 4 * (step + first // 16) + register
            found[index] = _pair(thread, bits, pieces(bits)[pair])
        return mgpu.FragmentedArray(_registers=found, _layout=layout, _is_signed=None)

    given = (words_layout(bits),)
    run: Any = plgpu.inline_mgpu(arg_types=given, return_type=out)(decoded)
    return run(words)


def _pair(thread: list[Any], bits: int, parts: Any) -> Any:
    """Two codes as a vector of two bfloat16."""
    if bits == 8:
        ((word, shift, _),) = parts
        field = _shifted(thread[word], shift)
        held = _or(_and(field, 0x7F * BOTH), _constant(BFLOAT16_128))
        extra = _or(_and(field, SIGN * BOTH), _constant(BFLOAT16_128))
        return arith.subf(_floats(held), _floats(extra))
    held = _constant(BFLOAT16_128)
    for word, shift, mask in parts:
        held = _or(_and(_shifted(thread[word], shift), mask * BOTH), held)
    offset = int(np.asarray(128 + 2 ** (bits - 1), jnp.bfloat16).view(np.uint16))
    return arith.subf(_floats(held), _floats(_constant(offset * BOTH)))


def _constant(value: int) -> Any:
    i32 = ir.IntegerType.get_signless(32)
    return arith.constant(i32, ir.IntegerAttr.get(i32, value))


def _shifted(word: Any, by: int) -> Any:
    return arith.shrui(word, _constant(by)) if by else word


def _and(word: Any, mask: int) -> Any:
    return arith.andi(word, _constant(mask))


def _or(x: Any, y: Any) -> Any:
    return arith.ori(x, y)


def _floats(word: Any) -> Any:
    return mgpu.utils.bitcast(word, ir.VectorType.get((2,), ir.BF16Type.get()))
