"""Floats of 4 and 8 bits and codebooks on the kernels of `qjax_kernels`."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from qjax.core.coded import Coded
from qjax.core.formats import MX, NVFP4, Codebook, Float
from qjax.core.qtensor import SiteActs
from qjax.ops.activations import code_input, coded_values, contraction
from qjax_kernels import crossing
from qjax_kernels.codebook_matmul import CodebookWeight
from qjax_kernels.codebook_matmul import blocks as codebook_blocks
from qjax_kernels.codebook_matmul import pallas_tpu as codebook_tpu
from qjax_kernels.float_matmul import FloatWeight
from qjax_kernels.float_matmul import blocks as float_blocks
from qjax_kernels.float_matmul import pallas_tpu as float_tpu
from qjax_kernels.scaled.operands import too_large

MX_ELEMENTS = {"fp4": "e2m1", "fp8_e4m3": "e4m3", "fp8_e5m2": "e5m2"}
LEAST_GROUP = 16


def has_levels(part: Coded) -> bool:
    """Whether the part is of the formats here."""
    return isinstance(part.format, Float | MX | NVFP4 | Codebook)


def unfit_levels(part: Coded, acts: SiteActs, x: Any, generation: str) -> str:
    """Why no kernel takes `x[M, K]` and the part; empty if one does."""
    return (
        _unfit_format(part, generation)
        or _unfit_activation(part, acts, x)
        or _unfit_size(part, acts, x, generation)
    )


def _unfit_format(part: Coded, generation: str) -> str:
    format, K = part.format, part.shape[0]
    group = format.granularity.rows
    if isinstance(format, Codebook) and format.bits not in (2, 3, 4):
        return f"no kernel for {format.name}"
    if isinstance(format, MX) and format.element not in MX_ELEMENTS:
        return f"no kernel for {format.name}"
    if isinstance(format, Float) and generation == "v7x" and format.dtype == "e4m3b11":
        return "e4m3b11 is no type of v7x"
    if group is not None and group % LEAST_GROUP:
        return f"a kernel has scales for whole {LEAST_GROUP} inputs, not for {group}"
    if format.bits == 8 and K % 4:
        return f"the kernel takes whole words of float8; there are {K} inputs"
    return ""


def _unfit_activation(part: Coded, acts: SiteActs, x: Any) -> str:
    activation = acts.activation
    if x.dtype != jnp.bfloat16:
        return f"the kernel contracts bfloat16; the activation is {x.dtype.name}"
    if activation is None:
        return ""
    if activation.outliers is not None:
        return "the kernel keeps no outlier features in float"
    coded = contraction(part.format, activation.format) == "float8"
    if coded and activation.format.granularity.rows is not None:
        return f"the kernel has one scale for a token, not {activation.format.name}"
    return ""


def _unfit_size(part: Coded, acts: SiteActs, x: Any, generation: str) -> str:
    M = x.shape[0]
    if isinstance(part.format, Codebook):
        weight = jax.eval_shape(codebook_weight, part)
        why = crossing.unfit(weight) or codebook_blocks.left_to_xla(
            generation, M, weight
        )
        blocks = codebook_blocks.choose(generation, M, weight)
        decoder = codebook_tpu.decoder(weight.bits)
        given = jax.eval_shape(codebook_tpu.operands, weight)
    else:
        weight = jax.eval_shape(float_weight, part)
        same = _in_float8(part, acts)
        why = float_blocks.left_to_xla(generation, M, weight, same)
        blocks = float_blocks.choose(generation, M, weight, same)
        decoder = float_tpu.how_decoded(weight, generation, same)
        given = jax.eval_shape(float_tpu.operands, weight)
    blocks = blocks.fitted(M, given, decoder)
    return why or too_large(generation, blocks, given, decoder, 2)


def _in_float8(part: Coded, acts: SiteActs) -> bool:
    """Whether codes of one type meet."""
    activation, format = acts.activation, part.format
    if activation is None or not isinstance(format, Float):
        return False
    other = activation.format
    return isinstance(other, Float) and other.dtype == format.dtype


def levels_product(
    x: Any, acts: SiteActs, part: Coded, dtype: Any, generation: str
) -> jax.Array:
    """`x[M, K]` times the part on a kernel, `[M, N]`."""
    x_scale, activation = None, acts.activation
    if activation is not None:
        if contraction(part.format, activation.format) == "float8":
            coded = code_input(x, acts)
            x, x_scale = coded.codes.T, coded.grid.scale.T
        else:
            x = coded_values(x, acts)
    if isinstance(part.format, Codebook):
        run = partial(codebook_tpu.codebook_matmul, x, codebook_weight(part))
    else:
        weight = float_weight(part)
        run = partial(float_tpu.float_matmul, x, weight, x_scale=x_scale)
    return run(generation=generation, dtype=dtype)


def float_weight(part: Coded) -> FloatWeight:
    """The part as the kernels take it."""
    format = part.format
    if isinstance(format, MX):
        element = MX_ELEMENTS[format.element]
    else:
        element = format.dtype if isinstance(format, Float) else "e2m1"
    rows, scale = format.granularity.rows, _by_output(part, part.scale)
    return FloatWeight(
        part.codes, scale, part.global_scale, element, rows, part.shape[0]
    )


def codebook_weight(part: Coded) -> CodebookWeight:
    """The part as the kernels take it; double-quantized scales are decoded."""
    format, grid = part.format, part.grid()
    assert isinstance(format, Codebook)
    levels = jnp.asarray(format.table) if grid.codebook is None else grid.codebook
    rows, scale = format.granularity.rows, _by_output(part, grid.scale)
    bits = format.bits or 4
    return CodebookWeight(part.codes, levels, scale, bits, rows, part.shape[0])


def _by_output(part: Coded, scale: Any) -> Any:
    """A scale for every output, where blocks share one."""
    cols, N = part.format.granularity.cols, part.shape[1]
    if cols == 1:
        return scale
    return jnp.repeat(scale, cols or N, axis=-1)[:, :N]
