"""HQQ checkpoints in safetensors (package `hqq` 0.2.8), written and read.

A linear is kept as the state of an `HQQLinear`. The weight `[out, in]` is cut into rows
of one group each, `[out*in/g, g]`; `W_q` packs equally many rows into the bits of each
number, the first rows highest; `scale` and `zero` are `[out*in/g, 1]`:
`w = (q - zero) * scale`. Groups along the other axis (`axis` 0) run over outputs that
lie far apart and are not read.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qjax.core.coded import Coded
from qjax.core.formats import Int, group
from qjax.core.qtensor import QTensor
from qjax.io.bits import pack_rows
from qjax.io.matrices import Matrix, tensor, words_of
from qjax.io.modules import FLOATS, Linear, Take, checked, common_scheme

# What each number of bits is packed as: (name, dtype, numbers in one, bits of each).
PACKINGS = {
    1: ("1bit_u8", "uint8", 8, 1),
    2: ("2bit_u8", "uint8", 4, 2),
    3: ("3bit_32", "int32", 10, 3),
    4: ("4bit_u8", "uint8", 2, 4),
    5: ("8bit_u8", "uint8", 1, 8),
    6: ("8bit_u8", "uint8", 1, 8),
    8: ("8bit_u8", "uint8", 1, 8),
}
OWNER = "config.json: quantization_config"
KNOWN = ("quant_method", "quant_config", "skip_modules")
OPTIONS = {
    *("weight_quant_params", "scale_quant_params", "zero_quant_params"),
    "offload_meta",
}
WEIGHT_OPTIONS = {
    *("nbits", "group_size", "axis", "channel_wise", "optimize", "round_zero"),
    "view_as_float",
}
# What says how the codes were found or run, and nothing of how they are stored.
INFORMATIVE = (
    *("unpack_view_dtype", "compute_dtype", "offload_meta", "encoded_state_dict"),
    *("stores_quant_config", "channel_wise", "optimize", "round_zero"),
)
FLAGS = ("view_as_float", "quant_scale", "quant_zero")


def write(matrix: Matrix) -> tuple[dict[str, np.ndarray], tuple[int, int | None]]:
    """The tensors of a linear by their last names, and its bits and group size.

    Raises:
      ValueError: the format cannot hold it; the message names the leaf.
    """
    _check(matrix)
    (K, N), bits, part = matrix.shape, matrix.bits, matrix.part
    size = matrix.group or K
    whole = matrix.integer.zero != "float"
    zero = matrix.zeros().astype(part.scale.dtype) if whole else part.zero
    name, kind, _, _ = PACKINGS[bits]
    tensors = {
        "W_q": pack(matrix.codes().reshape(-1, size), bits),
        "scale": part.scale.T.reshape(-1, 1),
        "zero": zero.T.reshape(-1, 1),
        "shape": np.array([N, K], np.int64),
        "packing": _text(name),
        "unpack_view_dtype": _text(f"torch.{kind}"),
        "compute_dtype": _text(f"torch.{np.dtype(matrix.dtype).name}"),
    }
    numbers = {"nbits": bits, "group_size": size, "axis": 1}
    tensors |= {last: np.array(value, np.int32) for last, value in numbers.items()}
    flags = dict.fromkeys(("encoded_state_dict", "stores_quant_config"), 1)
    flags |= {"channel_wise": 1, "optimize": 1, "round_zero": int(whole)}
    flags |= dict.fromkeys((*FLAGS, "offload_meta"), 0)
    tensors |= {last: np.array(value, np.uint8) for last, value in flags.items()}
    return tensors, (bits, matrix.group)


def _check(matrix: Matrix) -> None:
    format, (K, N) = matrix.part.format, matrix.shape
    if (
        not isinstance(format, Int)
        or format.bits not in PACKINGS
        or format.granularity.cols != 1
    ):
        raise ValueError(
            f"{matrix.path} is stored as {format.name}; HQQ's format holds whole "
            f"numbers of {tuple(PACKINGS)} bits in groups or channels"
        )
    if matrix.activation is not None:
        raise ValueError(
            f"{matrix.path} codes its input as {matrix.activation.format.name}, which "
            "HQQ's format cannot say"
        )
    if matrix.order is not None:
        raise ValueError(
            f"{matrix.path} takes its inputs in another order (act_order 'dynamic'), "
            "which HQQ's format cannot say"
        )
    size, (_, kind, count, _) = matrix.group or K, PACKINGS[format.bits]
    if K % size or (kind == "uint8" and N * K // size % count):
        raise ValueError(
            f"{matrix.path} is {K} x {N} in {format.name}; HQQ's format needs whole "
            f"groups, and a multiple of {count} of them"
        )


def _text(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8)


def pack(rows: np.ndarray, bits: int) -> np.ndarray:
    """Codes `[rows, g]` as `W_q`; at 3 bits, rows are added up to a multiple of 10."""
    _, kind, count, width = PACKINGS[bits]
    padded = np.pad(rows, ((0, -len(rows) % count), (0, 0))).astype(kind)
    parts = padded.reshape(count, -1, rows.shape[1])
    shifts = np.arange(count)[::-1] * width
    shifted = parts << shifts[:, None, None].astype(kind)
    return np.bitwise_or.reduce(shifted, axis=0)


def unpack(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The first `count` rows of codes, uint8."""
    _, kind, parts, width = PACKINGS[bits]
    shifts = (np.arange(parts)[::-1] * width).astype(kind)
    each = (packed[None] >> shifts[:, None, None]) & np.array(2**width - 1, kind)
    return each.reshape(-1, packed.shape[1])[:count].astype(np.uint8)


def config(modules: Sequence[Linear]) -> dict[str, Any]:
    """`quantization_config` of the linears, quantized or not.

    Raises:
      ValueError: two of them differ in format.
    """
    bits, size = common_scheme("hqq", modules)
    weights = {"nbits": bits, "group_size": size, "axis": 1, "channel_wise": True}
    weights |= {"optimize": True, "round_zero": False, "view_as_float": False}
    rest = {"scale_quant_params": None, "zero_quant_params": None}
    return {
        "quant_method": "hqq",
        "quant_config": {"weight_quant_params": weights, "offload_meta": False} | rest,
        "skip_modules": [m.name for m in modules if m.scheme is None],
    }


@dataclass(frozen=True)
class Reader:
    """Reads the quantized linears of a checkpoint; each says itself how it is kept."""

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> "Reader":
        """From `quantization_config`.

        Raises:
          ValueError: an option that is not known.
        """
        checked(OWNER, raw, KNOWN)
        _check_options(raw.get("quant_config"))
        return cls()

    def takes(self, take: Take) -> bool:
        """Whether a module is quantized."""
        return "W_q" in take

    def read(self, take: Take, K: int, N: int, dtype: Any) -> QTensor:
        """The weight of a module that is `[N, K]` in torch.

        Raises:
          ValueError: a tensor is missing, has a wrong shape or dtype, or no use.
        """
        bits, size = _layout(take, K, N)
        name, kind, count, _ = PACKINGS[bits]
        if (said := _characters(take, "packing")) != name:
            raise ValueError(f"{take.module}.packing is {said!r}, expected {name!r}")
        rows = N * K // size
        packed = take("W_q", kind, (-(-rows // count), size))
        codes = unpack(packed, bits, rows).reshape(N, K)
        scale, zero = (
            np.ascontiguousarray(take(last, FLOATS, (rows, 1)).reshape(N, -1).T)
            for last in ("scale", "zero")
        )
        format = Int(bits, group(size), zero="float")
        words = words_of(pack_rows(codes, bits), bits, K)
        part = Coded(words, scale, zero, None, None, format, (K, N))
        return tensor(part, dtype)


def _check_options(raw: Any) -> None:
    """Refuse unknown options: of all linears, or of some by the ends of their names."""
    owner = f"{OWNER}.quant_config"
    if raw is None:
        return
    by_name = isinstance(raw, Mapping) and not OPTIONS & set(raw)
    each = dict(raw) if by_name else {"": raw}
    for name, options in each.items():
        within = f"{owner}.{name}" if name else owner
        checked(within, options, OPTIONS)
        weights = options.get("weight_quant_params")
        if weights is not None:
            checked(f"{within}.weight_quant_params", weights, WEIGHT_OPTIONS)


def _layout(take: Take, K: int, N: int) -> tuple[int, int]:
    """Bits and group size, once everything else is as it is read here."""
    for last in INFORMATIVE:
        if last in take:
            take.used.add(take.tensors[last].name)
    for last in FLAGS:
        if last in take and take(last, "uint8", ()):
            raise ValueError(f"{take.module}.{last} is true, which is not supported")
    said = take("shape", "int64", (2,)).tolist()
    bits, size, axis = (
        int(take(last, "int32", ())) for last in ("nbits", "group_size", "axis")
    )
    if said != [N, K]:
        raise ValueError(
            f"{take.module}.shape is {said}, config.json asks for {[N, K]}"
        )
    if axis != 1:
        raise ValueError(
            f"{take.module}.axis is {axis}, supported is 1: groups along the inputs"
        )
    if bits not in PACKINGS or size < 1 or K % size:
        raise ValueError(
            f"{take.module} has nbits={bits}, group_size={size}; supported are "
            f"{tuple(PACKINGS)} bits and a group size that divides {K}"
        )
    return bits, size


def _characters(take: Take, last: str) -> str:
    count = take.tensors[last].shape if last in take else (0,)
    return take(last, "uint8", count).tobytes().decode("ascii", "replace")
