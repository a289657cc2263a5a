"""compressed-tensors checkpoints as QTensors, code for code."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any

import ml_dtypes
import numpy as np

from qjax.core.coded import Coded
from qjax.core.formats import NVFP4, Int
from qjax.core.qtensor import Activation, QTensor, SiteActs
from qjax.core.transforms import Permutation
from qjax.io.bits import pack_rows, unpack_rows
from qjax.io.compressed_config import OWNER, Config, Group
from qjax.io.matrices import in_order, order_of, tensor, words_of
from qjax.io.modules import FLOATS, Take


@dataclass(frozen=True)
class Reader:
    """Reads the quantized linears of a checkpoint."""

    config: Config

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> "Reader":
        """From `quantization_config`.

        Raises:
          ValueError: an option that is not known or not supported, named.
        """
        return cls(Config.of(raw))

    @property
    def coded_cache(self) -> bool:
        """Whether keys and values are coded, on scales in the checkpoint."""
        return self.config.coded_cache

    def takes(self, take: Take) -> bool:
        """Whether a module is quantized."""
        return self.config.group(take.module) is not None

    def read(self, take: Take, K: int, N: int, dtype: Any) -> QTensor:
        """The weight of a module that is `[N, K]` in torch.

        Raises:
          ValueError: a tensor is missing, has a wrong shape or dtype, or no use.
        """
        group = self.config.group(take.module)
        assert group is not None
        size = group.format.granularity.rows
        if group.format.granularity.cols == 1 and size and K % size:
            raise ValueError(
                f"{OWNER}: {take.module} has {K} inputs, no multiple of {size}"
            )
        part = _READERS[group.kind](take, group.format, K, N)
        order = _order(take, group, K)
        part = part if order is None else in_order(part, order)
        return tensor(part, dtype, _acts(take, group.activation, order))


def _packed(take: Take, format: Any, K: int, N: int) -> Coded:
    bits = format.bits
    words = take("weight_packed", "int32", (N, ceil(K * bits / 32)))
    said = take("weight_shape", ("int64", "int32"), (2,))
    if said.tolist() != [N, K]:
        raise ValueError(
            f"{take.module}.weight_shape is {said.tolist()}, config.json asks for "
            f"{[N, K]}"
        )
    scale, zero = _scale(take, format, K, N, FLOATS), None
    if not format.symmetric:
        Gk, Gn = scale.shape
        rows = take("weight_zero_point", "int32", (ceil(Gn * bits / 32), Gk)).T
        if bits == 8:
            zero = (unpack_rows(rows, 8, Gn) ^ 0x80).view(np.int8)
        else:
            zero = np.ascontiguousarray(rows).view(np.uint32)
    return Coded(words_of(words, bits, K), scale, zero, None, None, format, (K, N))


def _whole(take: Take, format: Any, K: int, N: int) -> Coded:
    bits, half = format.bits, format.half
    codes = _unsigned(take, take("weight", "int8", (N, K)), half)
    scale, zero = _scale(take, format, K, N, FLOATS), None
    if not format.symmetric:
        Gk, Gn = scale.shape
        signed = take("weight_zero_point", "int8", (Gn, Gk), *_single(Gn, Gk)).T
        zero = _unsigned(take, signed, half)
        small = bits < 8
        zero = pack_rows(zero, bits).view(np.uint32) if small else _int8(zero)
    words = words_of(pack_rows(codes, bits), bits, K)
    return Coded(words, scale, zero, None, None, format, (K, N))


def _unsigned(take: Take, signed: np.ndarray, half: int) -> np.ndarray:
    if signed.size and not -half <= signed.min() <= signed.max() < half:
        raise ValueError(
            f"{take.module} holds whole numbers outside [{-half}, {half - 1}], which "
            "config.json says it has no bits for"
        )
    return (signed.astype(np.int16) + half).astype(np.uint8)


def _int8(unsigned: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(unsigned) ^ 0x80).view(np.int8)


def _float(take: Take, format: Any, K: int, N: int) -> Coded:
    codes = take("weight", "float8_e4m3fn", (N, K)).T
    scale = _scale(take, format, K, N, FLOATS)
    return Coded(codes, scale, None, None, None, format, (K, N))


def _naive(take: Take, format: Any, K: int, N: int) -> Coded:
    return (_whole if isinstance(format, Int) else _float)(take, format, K, N)


def _nvfp4(take: Take, format: Any, K: int, N: int) -> Coded:
    scale = _scale(take, format, K, N, ("float8_e4m3fn",))
    whole = take.number("weight_global_scale", "float32")
    return Coded(_fp4(take, K, N), scale, None, None, whole, format, (K, N))


def _mxfp4(take: Take, format: Any, K: int, N: int) -> Coded:
    scale = _powers(take, format, K, N)
    return Coded(_fp4(take, K, N), scale, None, None, None, format, (K, N))


def _mxfp8(take: Take, format: Any, K: int, N: int) -> Coded:
    codes = take("weight", "float8_e4m3fn", (N, K)).T
    scale = _powers(take, format, K, N)
    return Coded(codes, scale, None, None, None, format, (K, N))


def _fp4(take: Take, K: int, N: int) -> np.ndarray:
    rows = take("weight_packed", "uint8", (N, K // 2))
    return np.ascontiguousarray(rows.view(np.uint32).T)


def _order(take: Take, group: Group, K: int) -> np.ndarray | None:
    """The order of the inputs in which groups are contiguous."""
    size = group.format.granularity.rows
    if "weight_g_idx" not in take and not group.reordered:
        return None
    groups = take("weight_g_idx", ("int32", "int64"), (K,))
    # What modules that are not reordered hold, where the file has it at all.
    if size is None or (groups == -1).all():
        return None
    kept = group.activation is None or group.activation.format.granularity.rows is None
    if not kept:
        raise ValueError(
            f"{take.module} reorders its inputs and codes them in groups, which is not "
            "supported"
        )
    return order_of(f"{take.module}.weight_g_idx", groups, size)


def _acts(
    take: Take, activation: Activation | None, order: np.ndarray | None
) -> SiteActs | None:
    t_in = None if order is None else Permutation(order)
    if activation is None:
        return None if t_in is None else SiteActs(t_in=t_in)
    if activation.dynamic:
        return SiteActs(t_in=t_in, activation=activation)
    if isinstance(activation.format, NVFP4):
        whole = take.number("input_global_scale", "float32")
        return SiteActs(t_in=t_in, activation=activation, global_scale=whole)
    zero = None
    if isinstance(activation.format, Int) and not activation.format.symmetric:
        signed = take.number("input_zero_point", "int8")
        zero = _unsigned(take, signed, activation.format.half)
    scale = take.number("input_scale", FLOATS)
    return SiteActs(scale, zero, t_in, activation=activation)


def _powers(take: Take, format: Any, K: int, N: int) -> np.ndarray:
    found = _scale(take, format, K, N, ("uint8",))
    return found.view(ml_dtypes.float8_e8m0fnu)


def _scale(
    take: Take, format: Any, K: int, N: int, dtypes: tuple[str, ...]
) -> np.ndarray:
    """Scales `[Gk, Gn]`."""
    Gk, Gn = format.granularity.counts(K, N)
    return np.ascontiguousarray(
        take("weight_scale", dtypes, (Gn, Gk), *_single(Gn, Gk)).T
    )


def _single(Gn: int, Gk: int) -> tuple[tuple[int, ...], ...]:
    """Further shapes in which a single column or number is stored."""
    if Gn * Gk == 1:
        return (1,), ()
    return ((Gn,),) if Gk == 1 else ()


_READERS = {
    "pack-quantized": _packed,
    "int-quantized": _whole,
    "float-quantized": _float,
    "naive-quantized": _naive,
    "nvfp4-pack-quantized": _nvfp4,
    "mxfp4-pack-quantized": _mxfp4,
    "mxfp8-quantized": _mxfp8,
}
