"""AWQ checkpoints in the GEMM layout (AutoAWQ), written and read.

`qweight[in, out/8]` and `qzeros[groups, out/8]` hold eight 4-bit numbers of a row in a
word, in an order of their own; `scales` are `[groups, out]`; `w = (q - zero) * scale`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qjax.core.coded import Coded
from qjax.core.formats import Int, channel, group
from qjax.core.qtensor import QTensor
from qjax.io import autoround
from qjax.io.bits import pack_rows, unpack_rows
from qjax.io.matrices import Matrix, tensor, words_of
from qjax.io.modules import FLOATS, Linear, Take, checked, common_scheme, group_size

BITS = 4
# Nibble i of a word holds column ORDER[i] of its eight.
ORDER = np.array([0, 2, 4, 6, 1, 3, 5, 7])
OWNER = "config.json: quantization_config"
INFORMATIVE = {
    *("modules_to_not_convert", "backend", "do_fuse", "fuse_max_seq_len"),
    *("modules_to_fuse", "exllama_config", "sym"),
}
KNOWN = {"quant_method", "bits", "group_size", "zero_point", "version"}


def write(matrix: Matrix) -> tuple[dict[str, np.ndarray], int]:
    """The tensors of a linear by their last names, and its group size.

    Raises:
      ValueError: the format cannot hold it; the message names the leaf.
    """
    format, (K, N) = matrix.part.format, matrix.shape
    grid = isinstance(format, Int) and format.zero != "float" and format.bits == BITS
    if not grid or format.granularity.cols != 1:
        raise ValueError(
            f"{matrix.path} is stored as {format.name}; AWQ's format holds 4-bit whole "
            "numbers in groups or channels, with whole zero points"
        )
    if matrix.activation is not None:
        raise ValueError(
            f"{matrix.path} codes its input as {matrix.activation.format.name}, which "
            "AWQ's format cannot say"
        )
    if matrix.order is not None and matrix.group is not None:
        raise ValueError(
            f"{matrix.path} has its groups in another order than its inputs (act_order "
            "'dynamic'), which AWQ's format cannot say"
        )
    if N % 8 or K % (matrix.group or K):
        raise ValueError(
            f"{matrix.path} is {K} x {N} in {format.name}; AWQ's format needs whole "
            "groups and a multiple of 8 outputs"
        )
    tensors = {
        "qweight": _pack(matrix.codes().T),
        "qzeros": _pack(matrix.zeros()),
        "scales": matrix.part.scale,
    }
    return tensors, matrix.group or -1


def _pack(codes: np.ndarray) -> np.ndarray:
    eights = codes.reshape(*codes.shape[:-1], -1, 8)
    return pack_rows(eights[..., ORDER].reshape(codes.shape), BITS)


def _unpack(words: np.ndarray, length: int) -> np.ndarray:
    eights = unpack_rows(words, BITS, length).reshape(*words.shape, 8)
    return eights[..., np.argsort(ORDER)].reshape(*words.shape[:-1], length)


def config(modules: Sequence[Linear]) -> dict[str, Any]:
    """`quantization_config` of the linears, quantized or not.

    Raises:
      ValueError: two of them differ in format.
    """
    return {
        "quant_method": "awq",
        "bits": BITS,
        "group_size": common_scheme("awq", modules),
        # The layout always has zero points; those of a symmetric grid are 8.
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": [m.name for m in modules if m.scheme is None],
    }


@dataclass(frozen=True)
class Reader:
    """Reads the quantized linears of a checkpoint."""

    group_size: int
    symmetric: bool

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> "Reader":
        """From `quantization_config`.

        Raises:
          ValueError: an option that is not known or not supported, named.
        """
        raw = autoround.plain(raw)
        checked(OWNER, raw, KNOWN | INFORMATIVE)
        layout = str(raw.get("version", "gemm")).lower()
        if raw.get("bits", BITS) != BITS or layout != "gemm":
            raise ValueError(
                f"{OWNER} says bits={raw.get('bits')!r}, version={layout!r}; supported "
                "is bits=4, version='gemm'"
            )
        size, zero = group_size(OWNER, raw), raw.get("zero_point", True)
        if not isinstance(zero, bool):
            raise ValueError(f"{OWNER}.zero_point is {zero!r}, expected true or false")
        return cls(size, not zero)

    def takes(self, take: Take) -> bool:
        """Whether a module is quantized."""
        return "qweight" in take

    def read(self, take: Take, K: int, N: int, dtype: Any) -> QTensor:
        """The weight of a module that is `[N, K]` in torch.

        Raises:
          ValueError: a tensor is missing, has a wrong shape or dtype, or no use.
        """
        size = K if self.group_size == -1 else self.group_size
        if N % 8 or K % size:
            raise ValueError(
                f"{take.module} is {N} x {K}, which groups of {size} inputs and words "
                "of 8 outputs do not fill evenly"
            )
        codes = _unpack(take("qweight", "int32", (K, N // 8)), N)
        zeros = _unpack(take("qzeros", "int32", (K // size, N // 8)), N)
        scale = take("scales", FLOATS, (K // size, N))
        if self.symmetric and (zeros != 8).any():
            raise ValueError(
                f"{take.module}.qzeros is not 8 everywhere, although config.json says "
                "that there are no zero points"
            )
        shared = channel() if self.group_size == -1 else group(size)
        format = Int(BITS, shared, symmetric=self.symmetric)
        zero = None if self.symmetric else pack_rows(zeros, BITS).view(np.uint32)
        words = words_of(pack_rows(codes.T, BITS), BITS, K)
        part = Coded(words, scale, zero, None, None, format, (K, N))
        return tensor(part, dtype)
