"""The rows of the matrix: every scheme in every format, and who else writes it."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import qjax
from qjax.core.formats import (
    Codebook,
    Float,
    Int,
    block,
    channel,
    group,
    tensor,
    token,
)
from qjax.core.qtensor import Activation


@dataclass(frozen=True)
class Row:
    """A scheme in a format: the recipe that we export, and who writes the same.

    `narrow`: the recipe for the random models, which are narrower than the groups of
    128 that some schemes have.
    """

    format: str
    name: str
    recipe: Any = None
    theirs: tuple[str, ...] = ()
    coded_cache: bool = False
    narrow: Any = None

    @property
    def folder(self) -> str:
        """Where our export of it is."""
        return f"{self.format}-{self.name}".replace(" ", "_")

    @property
    def label(self) -> str:
        """The row's head."""
        return f"{self.format} {self.name}"


def integer(bits: int, rows: int | None = 32, **more: Any) -> Any:
    """Round to nearest in groups, or in channels."""
    shared = group(rows) if rows else channel()
    return qjax.RTN(weights=Int(bits, shared, **more))


INT8 = Activation(Int(8, tensor(), symmetric=False), dynamic=False)
TOKENS = Activation(Int(8, token()))
BLOCKS = Activation(Float("e4m3", group(32)))
ZERO = {"symmetric": False}
# GPTQ's readers decode linears of blocks alone.
OUTSIDE = {"bert": ("*head/proj*",)}
ct = partial(Row, "compressed-tensors")
ROWS = (
    ct("W4A16", integer(4), ("llmcompressor-w4", "llmcompressor-w4_gptq")),
    ct("W4A16 asym", integer(4, **ZERO), ("llmcompressor-w4_asym",)),
    ct("W4A16 channel", integer(4, None), ("llmcompressor-w4_channel",)),
    ct("W4A16 g_idx", qjax.GPTQ(weights=Int(4, group(32)), act_order="dynamic")),
    ct("W2A16", integer(2), ("llmcompressor-w2",)),
    ct("W3A16", integer(3), ("llmcompressor-w3",)),
    ct("W8A16", integer(8), ("llmcompressor-w8",)),
    ct(
        "W8A8",
        qjax.RTN("W8A8"),
        ("llmcompressor-w8a8", "llmcompressor-w8a8_smooth_gptq"),
    ),
    ct(
        "W8A8 static",
        qjax.RTN(weights=Int(8), activations=INT8),
        ("llmcompressor-w8a8_static",),
    ),
    ct(
        "W4A8",
        qjax.RTN("W4A8"),
        ("llmcompressor-w4a8",),
        narrow=qjax.RTN(weights=Int(4, group(32)), activations=TOKENS),
    ),
    ct("FP8", qjax.RTN("FP8"), ("llmcompressor-fp8",)),
    ct("FP8_DYNAMIC", qjax.RTN("FP8_DYNAMIC"), ("llmcompressor-fp8_dynamic",)),
    ct(
        "FP8_BLOCK",
        qjax.RTN("FP8_BLOCK"),
        ("llmcompressor-fp8_block",),
        narrow=qjax.RTN(weights=Float("e4m3", block(32, 32)), activations=BLOCKS),
    ),
    ct(
        "FP8_DYNAMIC, cache",
        qjax.RTN("FP8_DYNAMIC"),
        ("llmcompressor-fp8_cache",),
        coded_cache=True,
    ),
    ct("NVFP4A16", qjax.RTN("NVFP4A16"), ("llmcompressor-nvfp4a16",)),
    ct("NVFP4", qjax.RTN("NVFP4"), ("llmcompressor-nvfp4",)),
    ct("MXFP4A16", qjax.RTN("MXFP4A16"), ("llmcompressor-mxfp4a16",)),
    ct("MXFP4", qjax.RTN("MXFP4"), ("llmcompressor-mxfp4",)),
    ct("MXFP8", qjax.RTN("MXFP8"), ("llmcompressor-mxfp8",)),
    ct(
        "mixed",
        (
            qjax.RTN("W8A8", targets="*down_proj*"),
            qjax.RTN("NVFP4A16", targets="*o_proj*"),
            integer(4),
        ),
        ("llmcompressor-mixed",),
    ),
    *(
        Row(
            "gptq",
            f"{bits} bits",
            integer(bits),
            (f"autoround-gptq-w{bits}", f"gptqmodel-w{bits}"),
        )
        for bits in (2, 3, 4, 8)
    ),
    Row("gptq", "4 bits asym", integer(4, **ZERO), ("autoround-gptq-w4_asym",)),
    Row("gptq", "4 bits channel", integer(4, None), ("autoround-gptq-w4_channel",)),
    Row(
        "gptq",
        "4 bits desc_act",
        qjax.GPTQ(weights=Int(4, group(32)), act_order="dynamic"),
        ("gptqmodel-w4_desc_act",),
    ),
    *(Row("gptq-v2", f"{bits} bits asym", integer(bits, **ZERO)) for bits in (2, 3, 8)),
    Row("gptq-v2", "4 bits asym", integer(4, **ZERO), ("gptqmodel-w4_asym",)),
    Row("awq", "4 bits", integer(4), ("autoround-awq-w4",)),
    Row("awq", "4 bits asym", integer(4, **ZERO), ("autoround-awq-w4_asym",)),
    Row("bitsandbytes", "NF4", qjax.RTN("NF4"), ("bitsandbytes-nf4",)),
    Row("bitsandbytes", "NF4 double", qjax.RTN("NF4_DQ"), ("bitsandbytes-nf4_double",)),
    Row(
        "bitsandbytes",
        "FP4",
        qjax.RTN(weights=Codebook("fp4", group(64))),
        ("bitsandbytes-fp4",),
    ),
    Row("bitsandbytes", "LLM.int8()", qjax.LLMInt8(), ("bitsandbytes-int8",)),
    *(
        Row("hqq", f"{bits} bits", qjax.HQQ(bits, 32), (f"hqq-w{bits}",))
        for bits in (1, 2, 3, 4, 8)
    ),
)
ARCHITECTURES = (
    *("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma2"),
    *("gemma3_text", "phi3", "gpt2", "opt", "bert"),
)


EXPERTS = ("mixtral", "qwen3_moe")
