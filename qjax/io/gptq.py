"""GPTQ checkpoints (AutoGPTQ, GPTQModel), version 1 and 2, written and read.

`qweight[in*b/32, out]` holds the codes packed along the input and
`qzeros[groups, out*b/32]` the zero points packed along the output, version 1 the zero
point less one; `scales` are `[groups, out]` and `g_idx[in]` is the group of every
input: `w = (q - zero[g_idx]) * scale[g_idx]`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, ClassVar

import numpy as np

from qjax.core.coded import Coded
from qjax.core.formats import Int, channel, group
from qjax.core.qtensor import QTensor, SiteActs
from qjax.core.transforms import Permutation
from qjax.io import autoround
from qjax.io.bits import pack_rows, unpack_rows
from qjax.io.matrices import Matrix, in_order, order_of, tensor, words_of
from qjax.io.modules import FLOATS, Linear, Take, checked, common_scheme, group_size

BITS = (2, 3, 4, 8)
VERSIONS = {"gptq": 1, "gptq_v2": 2}
# Where optimum (2.3) looks for a model's blocks, of the models here.
BLOCKS = ("model.layers", "model.decoder.layers", "transformer.h")
OWNER = "config.json: quantization_config"
# What says how the codes were found or run, and nothing of how they are stored.
INFORMATIVE = {
    *("meta", "model_name_or_path", "model_file_base_name", "model_seqlen"),
    *("damp_percent", "damp_auto_increment", "true_sequential", "static_groups", "mse"),
    *("dataset", "batch_size", "tokenizer", "pad_token_id", "cache_block_outputs"),
    *("use_cuda_fp16", "use_exllama", "disable_exllama", "exllama_config", "backend"),
    *("max_input_length", "block_name_to_quantize", "modules_in_block_to_quantize"),
    *("module_name_preceding_first_block", "act_group_aware", "lm_head"),
}
KNOWN = {
    *("quant_method", "bits", "group_size", "desc_act", "sym", "checkpoint_format"),
    *("pack_dtype", "is_marlin_format", "dynamic", "format", "method"),
}


@dataclass(frozen=True)
class Scheme:
    """What the configuration says of all linears together."""

    bits: int
    group_size: int
    sym: bool


@dataclass(frozen=True)
class Writer:
    """Writes version 1 or 2."""

    version: int
    copies: tuple[str, ...] = ("quantize_config.json",)
    conv1d: ClassVar[bool] = True

    def write(self, matrix: Matrix) -> tuple[dict[str, np.ndarray], Any]:
        """The tensors of a linear by their last names, and its scheme.

        Raises:
          ValueError: the format cannot hold it; the message names the leaf.
        """
        _check(matrix)
        zeros = matrix.zeros()
        if self.version == 1:
            if zeros.min() == 0:
                raise ValueError(
                    f"{matrix.path} has zero points of 0, which version 1 of GPTQ's "
                    "format, that keeps them less one, has no agreed code for: "
                    'export to "gptq-v2"'
                )
            zeros = zeros - np.uint8(1)
        tensors = {
            "qweight": matrix.words().T,
            "qzeros": pack_rows(zeros, matrix.bits),
            "scales": matrix.part.scale,
            "g_idx": matrix.groups(),
        }
        symmetric = bool(matrix.integer.symmetric)
        ordered = matrix.order is not None and matrix.group is not None
        return tensors, (Scheme(matrix.bits, matrix.group or -1, symmetric), ordered)

    def config(self, modules: Sequence[Linear]) -> dict[str, Any]:
        """`quantization_config` of the linears, quantized or not.

        Raises:
          ValueError: two of them differ in format, or one lies outside of the blocks.
        """
        scheme = common_scheme("gptq", modules, lambda stored: stored[0])
        left = [m.name for m in modules if m.scheme is None and m.name != "lm_head"]
        head = any(m.name == "lm_head" and m.scheme is not None for m in modules)
        found = {
            "quant_method": "gptq",
            "bits": scheme.bits,
            "group_size": scheme.group_size,
            "desc_act": any(m.scheme is not None and m.scheme[1] for m in modules),
            "sym": scheme.sym,
            "lm_head": head,
            "checkpoint_format": "gptq" if self.version == 1 else "gptq_v2",
            "pack_dtype": "int32",
            "meta": {"quantizer": [f"qjax:{version('qjax')}"]},
        }
        skipped = {f"-:^{re.escape(name)}$": {} for name in left}
        found |= {"dynamic": skipped} if skipped else {}
        return found | _blocks(modules)


def _blocks(modules: Sequence[Linear]) -> dict[str, str]:
    """Where the blocks are, if optimum does not look there by itself.

    Raises:
      ValueError: a linear outside of them is quantized, which no reader decodes.
    """
    coded = [m.name for m in modules if m.scheme is not None and m.name != "lm_head"]
    parts = [(name, re.split(r"\.\d+\.", name)) for name in coded]
    blocks = next((split[0] for _, split in parts if len(split) > 1), BLOCKS[0])
    for name, split in parts:
        if split[0] != blocks or len(split) == 1:
            raise ValueError(
                f"{name} is quantized, and readers of GPTQ's format decode linears of "
                f"{blocks} alone: leave it in float (ignore)"
            )
    return {} if blocks in BLOCKS else {"block_name_to_quantize": blocks}


def _check(matrix: Matrix) -> None:
    format, (K, N) = matrix.part.format, matrix.shape
    grid = isinstance(format, Int) and format.zero != "float"
    if not grid or format.bits not in BITS or format.granularity.cols != 1:
        raise ValueError(
            f"{matrix.path} is stored as {format.name}; GPTQ's format holds whole "
            f"numbers of {BITS} bits in groups or channels, with whole zero points"
        )
    if matrix.activation is not None:
        raise ValueError(
            f"{matrix.path} codes its input as {matrix.activation.format.name}, which "
            "GPTQ's format cannot say"
        )
    if K * matrix.bits % 32 or N * matrix.bits % 32 or K % (matrix.group or K):
        raise ValueError(
            f"{matrix.path} is {K} x {N} in {format.name}; GPTQ's format needs whole "
            "groups and whole 32-bit words of inputs and of outputs"
        )


@dataclass(frozen=True)
class Reader:
    """Reads the quantized linears of a checkpoint."""

    scheme: Scheme
    version: int
    ordered: bool
    conv1d: ClassVar[bool] = True

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> "Reader":
        """From `quantization_config`.

        Raises:
          ValueError: an option that is not known or not supported, named.
        """
        raw = autoround.plain(raw)
        checked(OWNER, raw, KNOWN | INFORMATIVE)
        stored = raw.get("checkpoint_format") or raw.get("format") or "gptq"
        found = {
            "bits": (raw.get("bits"), BITS),
            "checkpoint_format": (stored, tuple(VERSIONS)),
            "format": (raw.get("format") or stored, (stored,)),
            "method": (raw.get("method") or "gptq", ("gptq",)),
            "pack_dtype": (raw.get("pack_dtype") or "int32", ("int32",)),
            "is_marlin_format": (raw.get("is_marlin_format") or False, (False,)),
            "sym": (raw.get("sym", True), (True, False)),
            "desc_act": (raw.get("desc_act", False), (True, False)),
        }
        for name, (value, valid) in found.items():
            kinds = isinstance(value, bool), isinstance(valid[0], bool)
            if value not in valid or kinds[0] != kinds[1]:
                raise ValueError(f"{OWNER}.{name} is {value!r}, supported are {valid}")
        size = group_size(OWNER, raw)
        dynamic = raw.get("dynamic") or {}
        if not isinstance(dynamic, Mapping):
            raise ValueError(f"{OWNER}.dynamic is {dynamic!r}, expected an object")
        for name, change in dynamic.items():
            if not name.startswith("-:"):
                raise ValueError(
                    f"{OWNER}.dynamic: {name!r} sets {change!r}, but only one format "
                    "for all modules is supported"
                )
        scheme = Scheme(raw["bits"], size, raw.get("sym", True))
        return cls(scheme, VERSIONS[stored], raw.get("desc_act", False))

    def takes(self, take: Take) -> bool:
        """Whether a module is quantized."""
        return "qweight" in take

    def read(self, take: Take, K: int, N: int, dtype: Any) -> QTensor:
        """The weight of a module that is `[N, K]` in torch.

        Raises:
          ValueError: a tensor is missing, has a wrong shape or dtype, or no use.
        """
        bits, size = self.scheme.bits, self.scheme.group_size
        rows = K if size == -1 else size
        if K * bits % 32 or N * bits % 32 or K % rows:
            raise ValueError(
                f"{take.module} is {N} x {K}, which {bits} bits in groups of {rows} do "
                "not fill evenly"
            )
        shared = channel() if size == -1 else group(size)
        format = Int(bits, shared, symmetric=self.scheme.sym)
        words = take("qweight", "int32", (K * bits // 32, N)).T
        scale = take("scales", FLOATS, (K // rows, N))
        zero = self._zero(take, format, K // rows, N)
        codes = words_of(words, bits, K)
        part = Coded(codes, scale, zero, None, None, format, (K, N))
        order = None
        if self.ordered or "g_idx" in take:
            groups = take("g_idx", ("int32", "int64"), (K,))
            order = order_of(f"{take.module}.g_idx", groups, rows)
        if order is None:
            return tensor(part, dtype)
        acts = SiteActs(t_in=Permutation(order))
        return tensor(in_order(part, order), dtype, acts)

    def _zero(self, take: Take, format: Int, count: int, N: int) -> Any:
        """Packed zero points as a `Coded` keeps them; None where all are the middle."""
        bits = format.bits
        stored = unpack_rows(take("qzeros", "int32", (count, N * bits // 32)), bits, N)
        if self.version == 1:
            if (stored == 2**bits - 1).any():
                raise ValueError(
                    f"{take.module}.qzeros holds {2**bits - 1}, for which readers of "
                    "version 1 of GPTQ's format do not agree on a zero point"
                )
            stored = stored + np.uint8(1)
        if format.symmetric:
            if (stored != format.half).any():
                raise ValueError(
                    f"{take.module}.qzeros is not {format.half} everywhere, although "
                    "config.json says sym"
                )
            return None
        if bits == 8:
            return (stored ^ 0x80).view(np.int8)
        return pack_rows(stored, bits).view(np.uint32)
