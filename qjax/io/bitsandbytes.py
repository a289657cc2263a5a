"""bitsandbytes checkpoints (0.50): NF4, FP4 and LLM.int8(), written and read.

4 bits: `weight[n/2, 1]` holds the codes of the flattened `[out, in]`, the first of two
in the high half of a byte; blocks of the same flat order share an `absmax`, which
double quantization codes with 8 bits. 8 bits: `weight[out, in]` int8 and `SCB[out]`,
the largest magnitude of a row: `w = weight * SCB / 127`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, isfinite
from typing import Any, ClassVar

import numpy as np

from qjax.core.coded import Coded
from qjax.core.double_quant import DoubleQuantized, dynamic_map
from qjax.core.formats import Codebook, Int, channel, group, token
from qjax.core.qtensor import Activation, QTensor, SiteActs
from qjax.io.bits import pack_rows
from qjax.io.matrices import Matrix, tensor, words_of
from qjax.io.modules import FLOATS, Linear, Take, checked, common_scheme

STATE = "weight.quant_state.bitsandbytes__"
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED = 256
OWNER = "config.json: quantization_config"
conv1d = True  # GPT-2's linears are taken too, as any other linear is stored
INFORMATIVE = {
    *("bnb_4bit_compute_dtype", "llm_int8_skip_modules"),
    *("llm_int8_enable_fp32_cpu_offload", "_load_in_4bit", "_load_in_8bit"),
    *("bnb_4bit_use_double_quant", "bnb_4bit_quant_type"),
}
KNOWN = {
    *("quant_method", "load_in_4bit", "load_in_8bit", "llm_int8_threshold"),
    *("bnb_4bit_quant_storage", "llm_int8_has_fp16_weight"),
}


@dataclass(frozen=True)
class Scheme:
    """What the configuration says of all linears together."""

    bits: int
    levels: str = "nf4"
    double: bool = False
    threshold: float = 6.0
    dtype: str = "float32"


def write(matrix: Matrix) -> tuple[dict[str, np.ndarray], Scheme]:
    """The tensors of a linear by their last names, and its scheme.

    Raises:
      ValueError: the format cannot hold it; the message names the leaf.
    """
    if matrix.order is not None:
        raise ValueError(
            f"{matrix.path} takes its inputs in another order, which bitsandbytes "
            "cannot say"
        )
    if isinstance(matrix.part.format, Codebook):
        return _write_levels(matrix, matrix.part.format)
    return _write_int8(matrix)


def _write_levels(
    matrix: Matrix, format: Codebook
) -> tuple[dict[str, np.ndarray], Scheme]:
    _check_levels(matrix, format)
    (K, N), scale = matrix.shape, matrix.part.scale
    codes = matrix.codes().reshape(-1, 2)
    state: dict[str, Any] = {
        "quant_type": format.levels,
        "blocksize": format.granularity.rows,
        "dtype": np.dtype(matrix.dtype).name,
        "shape": [N, K],
    }
    tensors = {
        "weight": (codes[:, :1] << 4) | codes[:, 1:],
        "weight.quant_map": format.table,
    }
    double = isinstance(scale, DoubleQuantized)
    if double:
        state |= {"nested_blocksize": scale.block, "nested_dtype": "float32"}
        state["nested_offset"] = float(scale.offset)
        tensors["weight.absmax"] = scale.codes.T.reshape(-1)
        tensors["weight.nested_absmax"] = scale.absmax
        tensors["weight.nested_quant_map"] = dynamic_map()
    else:
        tensors["weight.absmax"] = scale.T.reshape(-1).astype(np.float32)
    text = json.dumps(state).encode()
    tensors[STATE + str(format.levels)] = np.frombuffer(text, np.uint8)
    return tensors, Scheme(4, str(format.levels), double, dtype=state["dtype"])


def _check_levels(matrix: Matrix, format: Codebook) -> None:
    rows, cols = format.granularity.rows, format.granularity.cols
    nested = format.double_quant in (None, NESTED)
    if (
        format.levels not in ("nf4", "fp4")
        or rows not in BLOCKS
        or cols != 1
        or not nested
    ):
        raise ValueError(
            f"{matrix.path} is stored as {format.name}; bitsandbytes holds nf4 and fp4 "
            f"in groups of {BLOCKS}, doubly quantized in blocks of {NESTED}"
        )
    if matrix.activation is not None:
        raise ValueError(
            f"{matrix.path} codes its input as {matrix.activation.format.name}, which "
            "bitsandbytes cannot say of 4-bit weights"
        )
    if matrix.shape[0] % rows:
        raise ValueError(
            f"{matrix.path} has {matrix.shape[0]} inputs, no multiple of {rows}; "
            "bitsandbytes' blocks would run over the ends of rows"
        )


def _write_int8(matrix: Matrix) -> tuple[dict[str, np.ndarray], Scheme]:
    format, activation = matrix.part.format, matrix.activation
    shared = (format.granularity.rows, format.granularity.cols)
    whole = isinstance(format, Int) and format.bits == 8 and bool(format.symmetric)
    if (
        activation is None
        or not (whole and activation.dynamic)
        or (shared, activation.format) != ((None, 1), _INPUT)
    ):
        inputs = "float" if activation is None else activation.format.name
        raise ValueError(
            f"{matrix.path} is stored as {format.name}, its input as {inputs}; "
            "bitsandbytes holds nf4, fp4 and what LLMInt8 makes"
        )
    scale = matrix.part.scale.astype(np.float32)
    tensors = {
        "weight": (matrix.codes() ^ 0x80).view(np.int8),
        "SCB": (scale * np.float32(127)).reshape(-1),
        "weight_format": np.zeros((), np.uint8),
    }
    return tensors, Scheme(8, threshold=float(activation.outliers or 0.0))


_INPUT = Int(8, token(), scale_rule="float16")


def config(modules: Sequence[Linear]) -> dict[str, Any]:
    """`quantization_config` of the linears, quantized or not.

    Raises:
      ValueError: two of them differ in format.
    """
    scheme = common_scheme("bitsandbytes", modules)
    four = scheme.bits == 4
    return {
        "quant_method": "bitsandbytes",
        "_load_in_4bit": four,
        "_load_in_8bit": not four,
        "load_in_4bit": four,
        "load_in_8bit": not four,
        "bnb_4bit_quant_type": scheme.levels,
        "bnb_4bit_use_double_quant": scheme.double,
        "bnb_4bit_compute_dtype": scheme.dtype,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_threshold": scheme.threshold,
        "llm_int8_skip_modules": [m.name for m in modules if m.scheme is None],
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
    }


@dataclass(frozen=True)
class Reader:
    """Reads the quantized linears of a checkpoint."""

    bits: int
    threshold: float
    conv1d: ClassVar[bool] = True

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> "Reader":
        """From `quantization_config`.

        Raises:
          ValueError: an option that is not known or not supported, named.
        """
        checked(OWNER, raw, KNOWN | INFORMATIVE)
        four, eight = (raw.get(f"load_in_{n}bit", False) for n in (4, 8))
        if not isinstance(four, bool) or not isinstance(eight, bool) or four == eight:
            raise ValueError(
                f"{OWNER} says load_in_4bit={four!r}, load_in_8bit={eight!r}; one of "
                "them must be true"
            )
        for name, wanted in (
            ("bnb_4bit_quant_storage", "uint8"),
            ("llm_int8_has_fp16_weight", False),
        ):
            if raw.get(name, wanted) not in (wanted, None):
                raise ValueError(
                    f"{OWNER}.{name} is {raw[name]!r}, supported is {wanted!r}"
                )
        threshold = raw.get("llm_int8_threshold", 6.0)
        number = isinstance(threshold, (int, float)) and not isinstance(threshold, bool)
        if not number or not threshold >= 0:
            raise ValueError(
                f"{OWNER}.llm_int8_threshold is {threshold!r}, expected a number >= 0"
            )
        return cls(4 if four else 8, float(threshold))

    def takes(self, take: Take) -> bool:
        """Whether a module is quantized."""
        if self.bits == 8:
            return "SCB" in take
        return any(last.startswith(STATE) for last in take.tensors)

    def read(self, take: Take, K: int, N: int, dtype: Any) -> QTensor:
        """The weight of a module that is `[N, K]` in torch.

        Raises:
          ValueError: a tensor is missing, has a wrong shape or dtype, or no use.
        """
        if self.bits == 8:
            return self._int8(take, K, N, dtype)
        return tensor(_levels(take, K, N), dtype)

    def _int8(self, take: Take, K: int, N: int, dtype: Any) -> QTensor:
        codes = take("weight", "int8", (N, K)).T
        scale = take("SCB", "float32", (1, N), (N,), (N, 1)) / np.float32(127)
        if "weight_format" in take and take("weight_format", "uint8", (), (1,)).any():
            raise ValueError(
                f"{take.module}.weight_format is not 0, the order of rows; other "
                "orders are not supported"
            )
        format = Int(8, channel(), scale_rule="float16")
        part = Coded(codes, scale, None, None, None, format, (K, N))
        activation = Activation(_INPUT, outliers=self.threshold or None)
        return tensor(part, dtype, SiteActs(activation=activation))


def _levels(take: Take, K: int, N: int) -> Coded:
    name, state = _state(take)
    size, stored = state.get("blocksize"), state.get("shape")
    if size not in BLOCKS or stored != [N, K] or K % size:
        raise ValueError(
            f"{take.module}: the quantization state says blocks of {size!r} and shape "
            f"{stored!r}; config.json asks for {[N, K]}, in whole blocks of {BLOCKS}"
        )
    nested = "nested_blocksize" in state
    if nested:
        _check_nested(take, state)
    format = Codebook(
        name, group(size), double_quant=state["nested_blocksize"] if nested else None
    )
    if not np.array_equal(take("weight.quant_map", "float32", (16,)), format.table):
        raise ValueError(f"{take.module}.weight.quant_map is not the table of {name}")
    bytes_ = take("weight", "uint8", (N * K // 2, 1), (1, N * K // 2))
    codes = np.stack([bytes_ >> 4, bytes_ & 15], -1).reshape(N, K)
    words = words_of(pack_rows(codes, 4), 4, K)
    scale = _nested(take, state, K, N) if nested else _absmax(take, size, K, N)
    return Coded(words, scale, None, None, None, format, (K, N))


def _state(take: Take) -> tuple[str, dict[str, Any]]:
    last = next(each for each in take.tensors if each.startswith(STATE))
    name = last.removeprefix(STATE)
    raw = take(last, "uint8", take.tensors[last].shape).tobytes()
    try:
        state = json.loads(raw)
    except (ValueError, RecursionError):
        state = None
    if not isinstance(state, dict) or name not in ("nf4", "fp4"):
        raise ValueError(
            f"{take.module}.{last} is no quantization state of nf4 or fp4 weights"
        )
    if state.get("quant_type") != name:
        raise ValueError(
            f"{take.module}.{last} says quant_type={state.get('quant_type')!r}"
        )
    return name, state


def _absmax(take: Take, size: int, K: int, N: int) -> np.ndarray:
    # bfloat16 where a model was saved after it ran on a CPU.
    flat = take("weight.absmax", FLOATS, (N * K // size,)).astype(np.float32)
    return np.ascontiguousarray(flat.reshape(N, -1).T)


def _check_nested(take: Take, state: Mapping[str, Any]) -> None:
    block, offset = state["nested_blocksize"], state.get("nested_offset")
    whole = isinstance(block, int) and not isinstance(block, bool) and block > 0
    number = isinstance(offset, float) and isfinite(offset)
    if not whole or not number:
        raise ValueError(
            f"{take.module}: the quantization state says nested_blocksize={block!r}, "
            f"nested_offset={offset!r}; expected a positive whole number and a number"
        )


def _nested(take: Take, state: Mapping[str, Any], K: int, N: int) -> DoubleQuantized:
    size, block, offset = (
        state[key] for key in ("blocksize", "nested_blocksize", "nested_offset")
    )
    levels = take("weight.nested_quant_map", "float32", (256,))
    if not np.array_equal(levels, dynamic_map()):
        raise ValueError(f"{take.module}.weight.nested_quant_map is not the known one")
    count = N * K // size
    codes = take("weight.absmax", "uint8", (count,)).reshape(N, -1).T
    absmax = take("weight.nested_absmax", "float32", (ceil(count / block),))
    return DoubleQuantized(
        np.ascontiguousarray(codes), absmax, np.float32(offset), block
    )
