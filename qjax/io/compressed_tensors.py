"""compressed-tensors (0.19): the tensors of a quantized linear.

Weights are `[out, in]`. `pack-quantized` keeps integers as int32 words along the input,
`int-quantized` and `float-quantized` keep one byte for each weight, the fp4 formats two
weights in a byte, the even one low. Scales are `[out, groups]`.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from qjax.core.formats import MX, NVFP4, Float, Int
from qjax.core.qtensor import Activation
from qjax.io.bits import pack_rows
from qjax.io.compressed_arguments import input_arguments, weight_arguments
from qjax.io.matrices import Matrix, integer_of
from qjax.io.modules import Linear

METHOD = "compressed-tensors"
VERSION = "0.19.0"
Tensors = dict[str, np.ndarray]
# Keys and values in float8, on one static scale for those of a layer.
CACHE = {
    **{"actorder": None, "block_structure": None, "dynamic": False, "group_size": None},
    **{"num_bits": 8, "observer": None, "observer_kwargs": {}, "scale_dtype": None},
    **{"strategy": "tensor", "symmetric": True, "type": "float", "zp_dtype": None},
}


def write(matrix: Matrix) -> tuple[Tensors, str]:
    """The tensors of a linear by their last names, and its config group as JSON.

    Raises:
      ValueError: the format cannot hold it; the message names the leaf.
    """
    part, activation = matrix.part, matrix.activation
    _check_groups(matrix)
    weights = weight_arguments(matrix.path, part.format)
    inputs = input_arguments(matrix.path, activation)
    if matrix.order is not None and matrix.group is not None:
        _check_order(matrix)
        weights["actorder"] = "group"
    format = _format_name(part.format, activation)
    tensors = _WRITERS[format](matrix) | _input_tensors(matrix)
    group = {
        "format": format,
        "input_activations": inputs,
        "output_activations": None,
        "weights": weights,
    }
    return tensors, json.dumps(group, sort_keys=True)


def _check_groups(matrix: Matrix) -> None:
    size, format = matrix.group, matrix.part.format
    cols = format.granularity.cols
    if size is not None and cols == 1 and matrix.shape[0] % size:
        raise ValueError(
            f"{matrix.path} has groups of {size} in {matrix.shape[0]} inputs; "
            "compressed-tensors needs whole groups"
        )


def _check_order(matrix: Matrix) -> None:
    if not isinstance(matrix.part.format, Int) or matrix.activation is not None:
        raise ValueError(
            f"{matrix.path} has its groups in another order than its inputs (act_order "
            "'dynamic'), which compressed-tensors holds for pack-quantized alone"
        )


def _format_name(format: Any, activation: Activation | None) -> str:
    """compressed-tensors' choice; below float8 inputs packed, as vLLM reads it."""
    if isinstance(format, NVFP4):
        return "nvfp4-pack-quantized"
    if isinstance(format, MX):
        return "mxfp4-pack-quantized" if format.bits == 4 else "mxfp8-quantized"
    if isinstance(format, Float):
        return "float-quantized"
    whole = activation is not None and isinstance(activation.format, Int)
    return "int-quantized" if whole else "pack-quantized"


def _packed(matrix: Matrix) -> Tensors:
    K, N = matrix.shape
    if matrix.part.scale.size == 1 and not matrix.integer.symmetric:
        raise ValueError(
            f"{matrix.path} has one zero point for all weights, which "
            "compressed-tensors does not pack"
        )
    tensors = {
        "weight_packed": matrix.words(),
        "weight_scale": _scale(matrix),
        "weight_shape": np.array([N, K], np.int64),
    }
    if not matrix.integer.symmetric:
        zeros = matrix.zeros()
        tensors["weight_zero_point"] = pack_rows(zeros, matrix.bits).T
    if matrix.order is not None and matrix.group is not None:
        tensors["weight_g_idx"] = matrix.groups()
    return tensors


def _whole(matrix: Matrix) -> Tensors:
    half = matrix.integer.half
    tensors = {"weight": _signed(matrix.codes(), half), "weight_scale": _scale(matrix)}
    if not matrix.integer.symmetric:
        tensors["weight_zero_point"] = _signed(matrix.zeros(), half).T
    return tensors


def _float(matrix: Matrix) -> Tensors:
    return {"weight": matrix.codes(), "weight_scale": _scale(matrix)}


def _fp4(matrix: Matrix) -> Tensors:
    part = matrix.part
    tensors = {
        "weight_packed": np.ascontiguousarray(matrix.words()).view(np.uint8),
        "weight_scale": part.scale.T,
    }
    if isinstance(part.format, MX):
        return tensors | {"weight_scale": part.scale.T.view(np.uint8)}
    return tensors | {"weight_global_scale": part.global_scale.reshape(1)}


def _mxfp8(matrix: Matrix) -> Tensors:
    return {
        "weight": matrix.codes(),
        "weight_scale": matrix.part.scale.T.view(np.uint8),
    }


def _scale(matrix: Matrix) -> np.ndarray:
    """That of all weights together as `[1]`, else `[out, groups]`."""
    scale, shared = matrix.part.scale, matrix.part.format.granularity
    whole = (shared.rows, shared.cols) == (None, None)
    return scale.reshape(1) if whole else scale.T


def _signed(codes: np.ndarray, half: int) -> np.ndarray:
    return (codes.astype(np.int16) - half).astype(np.int8)


_WRITERS = {
    "pack-quantized": _packed,
    "int-quantized": _whole,
    "float-quantized": _float,
    "nvfp4-pack-quantized": _fp4,
    "mxfp4-pack-quantized": _fp4,
    "mxfp8-quantized": _mxfp8,
}


def _input_tensors(matrix: Matrix) -> Tensors:
    """The static range of the input, where it has one."""
    acts, activation = matrix.acts, matrix.activation
    if activation is None or activation.dynamic:
        return {}
    if isinstance(activation.format, NVFP4):
        return {"input_global_scale": acts.global_scale.reshape(1)}
    tensors = {"input_scale": acts.scale.reshape(1)}
    if acts.zero is not None:
        zero = _signed(acts.zero.reshape(1), integer_of(activation.format).half)
        tensors["input_zero_point"] = zero
    return tensors


def config(modules: Sequence[Linear]) -> dict[str, Any]:
    """`quantization_config` of the linears, quantized or not."""
    groups: dict[str, list[str]] = {}
    for module in modules:
        if module.scheme is not None:
            groups.setdefault(module.scheme, []).append(module.name)
    ignore = [module.name for module in modules if module.scheme is None]
    only = len(groups) == 1
    named = {
        f"group_{i}": json.loads(scheme) | {"targets": ["Linear"] if only else names}
        for i, (scheme, names) in enumerate(groups.items())
    }
    formats = {group["format"] for group in named.values()}
    return {
        "config_groups": named,
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "global_compression_ratio": None,
        "ignore": ignore,
        "kv_cache_scheme": None,
        "quant_method": METHOD,
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": VERSION,
    }
