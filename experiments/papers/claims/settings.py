"""What each paper claims: the settings to run, its own numbers, and what must be less.

A number is the paper's (or, where it says so, the authors' page's) for the same kind of
setting on its own model and text; `source` says which table. Only the direction can be
compared with ours.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

import qjax
from qjax.methods.zeroquant import zeroquant_mixed
from qjax.zeroquant_search import search_zeroquant

# A recipe, or what makes one of `(f, params, batches)`; None is full precision.
Recipe = Any


@dataclass(frozen=True)
class Row:
    """One setting, and the paper's number for it.

    `recorded` names a row of other results (`compare`, `calibrated` or `ptq` of
    `run.py`, a slash and its label), which then is not run again.
    """

    label: str
    recipe: Recipe
    paper: float | None = None
    recorded: str | None = None


@dataclass(frozen=True)
class Less:
    """The claim that `better` diverges less than `margin` times what `worse` does."""

    better: str
    worse: str
    margin: float = 1.0


@dataclass(frozen=True)
class Paper:
    """A method's experiment; `model` is one of those of `run.py`."""

    source: str
    rows: tuple[Row, ...]
    claims: tuple[Less, ...]
    model: str = "bundled"


def integers(bits: int, size: int | None = 128, symmetric: bool = False) -> qjax.Int:
    """Groups of `size` inputs, or all inputs of an output."""
    granularity = qjax.channel() if size is None else qjax.group(size)
    zero = "none" if symmetric else "int"
    return qjax.Int(bits, granularity, symmetric=symmetric, zero=zero)


TENSOR = qjax.Int(8, qjax.tensor())
STATIC = qjax.Activation(TENSOR, dynamic=False)
TOKENS = qjax.Activation(qjax.Int(8, qjax.token()))
WHOLE = qjax.RTN(weights=TENSOR, activations=qjax.Activation(TENSOR))
FLOAT = "full precision"


def rounded(bits: int, size: int | None = 128, symmetric: bool = False) -> Any:
    """Round-to-nearest weights."""
    return qjax.RTN(weights=integers(bits, size, symmetric))


def solved(bits: int, size: int | None = 128, symmetric: bool = False) -> Any:
    """GPTQ's weights, in the order of the paper's algorithm."""
    return qjax.GPTQ(weights=integers(bits, size, symmetric), act_order="off")


def coded_inputs(bits: int) -> qjax.Activation:
    """One static range for the whole activation."""
    format = qjax.Int(bits, qjax.tensor(), symmetric=False)
    return qjax.Activation(format, dynamic=False)


def searched(f: Any, params: Any, batches: Any) -> Any:
    """ZeroQuant's settings, chosen for each linear."""
    return search_zeroquant(f, params, batches, tolerance=0.02)


def mixed(sensitivity: str, bits: int = 3) -> Callable[..., Any]:
    """2, 3, 4 and 8 bits in as many bytes as `bits` takes everywhere."""

    def recipe(f: Any, params: Any, batches: Any) -> Any:
        uniform = qjax.quantize(f, params, rounded(bits), batches[:1], progress=False)
        leaves = jax.tree.leaves(uniform, is_leaf=qjax.is_quantized)
        size = sum(leaf.nbytes for leaf in leaves if qjax.is_quantized(leaf))
        candidates = tuple(solved(b) for b in (2, 3, 4, 8))
        return qjax.MixedPrecision(
            candidates, target_bytes=size, sensitivity=sensitivity, tokens=512
        )

    return recipe


PAPERS: dict[str, Paper] = {
    "gptq": Paper(
        "OPT-125M, WikiText-2, one scale for each output; tables of arXiv:2210.17323",
        (
            Row(FLOAT, None, 27.65, "calibrated/full precision"),
            Row("RTN 4 bits", None, 37.28, "compare/RTN int4 g128"),
            Row("GPTQ 4 bits", None, 31.12, "calibrated/GPTQ int4 g128"),
            Row("RTN 3 bits", None, 1.3e3, "compare/RTN int3 g128"),
            Row("GPTQ 3 bits", None, 53.85, "calibrated/GPTQ int3 g128"),
        ),
        (
            Less("GPTQ 4 bits", "RTN 4 bits", 0.9),
            Less("GPTQ 3 bits", "RTN 3 bits", 0.8),
        ),
    ),
    "awq": Paper(
        "Llama-2-7B, WikiText-2, g128; the table of Llama-2 models of arXiv:2306.00978",
        (
            Row(FLOAT, None, 5.47, "calibrated/full precision"),
            Row("RTN 3 bits", None, 6.66, "compare/RTN int3 g128"),
            Row("GPTQ 3 bits", None, 6.43, "calibrated/GPTQ int3 g128"),
            Row("AWQ 3 bits", None, 6.24, "calibrated/AWQ int3 g128"),
            Row(
                "RTN 4 bits, outliers",
                None,
                5.73,
                "ptq/qjax rtn-w4a16 tiny_llama_outliers",
            ),
            Row(
                "AWQ 4 bits, outliers",
                None,
                5.60,
                "ptq/qjax awq-w4a16-asym tiny_llama_outliers",
            ),
        ),
        (
            Less("AWQ 4 bits, outliers", "RTN 4 bits, outliers", 0.5),
            Less("AWQ 3 bits", "RTN 3 bits"),
            Less("AWQ 3 bits", "GPTQ 3 bits"),
        ),
    ),
    "smoothquant": Paper(
        "OPT-175B, WikiText; table 3 of arXiv:2211.10438",
        (
            Row(FLOAT, None, 10.99),
            Row("W8A8, whole tensors", WHOLE, 93080.0),
            Row("LLM.int8()", qjax.LLMInt8(), 11.10),
            Row(
                "SmoothQuant-O1",
                (qjax.SmoothQuant(), qjax.RTN(weights=TENSOR, activations=TOKENS)),
                11.11,
            ),
            Row("SmoothQuant-O2", (qjax.SmoothQuant(), WHOLE), 11.14),
            Row(
                "SmoothQuant-O3",
                (qjax.SmoothQuant(), qjax.RTN(weights=TENSOR, activations=STATIC)),
                11.17,
            ),
        ),
        (
            Less("SmoothQuant-O1", "W8A8, whole tensors", 0.2),
            Less("SmoothQuant-O2", "W8A8, whole tensors", 0.2),
            Less("SmoothQuant-O3", "W8A8, whole tensors", 0.2),
        ),
        "outliers",
    ),
    "llm_int8": Paper(
        "13B parameters, C4; table 1 of arXiv:2208.07339",
        (
            Row(FLOAT, None, 12.45),
            Row("int8 absmax", WHOLE, 19.08),
            Row("int8 absmax vector-wise", qjax.LLMInt8(threshold=0), 16.48),
            Row("LLM.int8() vector-wise", qjax.LLMInt8(), 12.45),
        ),
        (
            Less("LLM.int8() vector-wise", "int8 absmax vector-wise", 0.2),
            Less("LLM.int8() vector-wise", "int8 absmax", 0.1),
        ),
        "outliers",
    ),
    "zeroquant": Paper(
        "GPT-3 1.3B, WikiText-2; the table of GPT-3 models of arXiv:2206.01861",
        (
            Row(FLOAT, None, 15.3),
            Row(
                "W8A8, static whole tensors",
                qjax.RTN(weights=TENSOR, activations=STATIC),
                18.9,
            ),
            Row("W8A8 ZeroQuant", qjax.ZeroQuant(), 15.7),
            Row("W8A8 ZeroQuant, searched", searched),
            Row(
                "W4/8A16, whole tensors",
                (
                    qjax.RTN(weights=qjax.Int(4, qjax.tensor()), targets="*mlp*"),
                    qjax.RTN(weights=TENSOR),
                ),
                1.35e5,
            ),
            Row(
                "W4/8A16 ZeroQuant",
                (
                    qjax.ZeroQuant(4, activation_bits=None, targets="*mlp*"),
                    qjax.ZeroQuant(8, activation_bits=None),
                ),
                21.9,
            ),
            Row("W4/8A8 ZeroQuant", zeroquant_mixed(), 24.1),
        ),
        (
            Less("W8A8 ZeroQuant", "W8A8, static whole tensors", 0.9),
            Less("W4/8A16 ZeroQuant", "W4/8A16, whole tensors", 0.9),
        ),
    ),
    "rptq": Paper(
        "OPT-1.3B, WikiText-2; table of github.com/hahnyuan/RPTQ4LLM",
        (
            Row(FLOAT, None, 14.63),
            Row("W4A16", solved(4), 14.78),
            Row(
                "W4A8, one range",
                qjax.GPTQ(weights=integers(4), activations=coded_inputs(8)),
            ),
            Row("W4A8 RPTQ", qjax.RPTQ(solved(4), 8), 15.16),
            Row(
                "W4A4, one range",
                qjax.GPTQ(weights=integers(4), activations=coded_inputs(4)),
            ),
            Row("W4A4 RPTQ", qjax.RPTQ(solved(4), 4), 16.97),
        ),
        (
            Less("W4A8 RPTQ", "W4A8, one range", 0.9),
            Less("W4A4 RPTQ", "W4A4, one range", 0.5),
        ),
        "outliers",
    ),
    "gptaq": Paper(
        "Llama-3.1-8B-Instruct, percent of GSM8K platinum that is right (more is "
        "better), 4 bits; the authors' page",
        (
            Row(FLOAT, None, None, "calibrated/full precision"),
            Row("GPTQ 2 bits", None, 39.95, "calibrated/GPTQ int2 g128"),
            Row("GPTAQ 2 bits", None, 76.01, "calibrated/GPTAQ int2 g128"),
        ),
        (Less("GPTAQ 2 bits", "GPTQ 2 bits", 0.97),),
    ),
    "qep": Paper(
        "Llama-2-7B, WikiText-2, 2 bits g32; arXiv:2504.09629",
        (
            Row(FLOAT, None, 5.47, "calibrated/full precision"),
            Row("GPTQ 2 bits", None, 14.91, "calibrated/GPTQ int2 g128"),
            Row("QEP and GPTQ 2 bits", None, 10.46, "calibrated/QEP int2 g128"),
        ),
        (Less("QEP and GPTQ 2 bits", "GPTQ 2 bits", 0.97),),
    ),
    "imatrix": Paper(
        "Llama-3.1-8B, WikiText-2, W4A16; llm-compressor's page on imatrix_mse",
        (
            Row(FLOAT, None, 6.24),
            Row("RTN", qjax.RTN("W4A16"), 6.96),
            Row("GPTQ", qjax.GPTQ("W4A16"), 6.92),
            Row("RTN, imatrix", qjax.IMatrix("W4A16"), 6.85),
            Row(
                "GPTQ, imatrix",
                qjax.GPTQ("W4A16", search=qjax.IMatrix().search, importance=True),
                6.83,
            ),
        ),
        (
            Less("RTN, imatrix", "RTN", 0.9),
            Less("GPTQ, imatrix", "GPTQ"),
            Less("RTN, imatrix", "GPTQ"),
        ),
    ),
    "sequential_mse": Paper(
        "AIMET's method; no published number for a language model was found",
        (
            Row(FLOAT, None, None, "calibrated/full precision"),
            Row("RTN 4 bits", None, None, "compare/RTN int4 g128"),
            Row(
                "SequentialMSE 4 bits", None, None, "calibrated/SequentialMSE int4 g128"
            ),
            Row("RTN 3 bits", None, None, "compare/RTN int3 g128"),
            Row(
                "SequentialMSE 3 bits", None, None, "calibrated/SequentialMSE int3 g128"
            ),
        ),
        (
            Less("SequentialMSE 4 bits", "RTN 4 bits", 0.8),
            Less("SequentialMSE 3 bits", "RTN 3 bits", 0.8),
        ),
    ),
    "bias_correction": Paper(
        "MobileNetV2, percent of ImageNet that is right (more is better), int8; a "
        "reimplementation's page (github.com/jakc4103/DFQ), with clipped weights",
        (
            Row(FLOAT, None, 71.81, "calibrated/full precision"),
            Row("RTN W8A8", None, 0.15, "calibrated/W8A8"),
            Row("BiasCorrection W8A8", None, 65.76, "calibrated/BiasCorrection W8A8"),
        ),
        (Less("BiasCorrection W8A8", "RTN W8A8"),),
    ),
    "cross_layer": Paper(
        "MobileNetV2, percent of ImageNet that is right (more is better), int8, one "
        "scale for a matrix; the paper's (arXiv:1906.04721) as quoted by "
        "github.com/KwangHoonAn/Quantizations",
        (
            Row(FLOAT, None, 71.72),
            Row("RTN", qjax.RTN(weights=TENSOR), 0.1),
            Row(
                "CrossLayerEqualization",
                (qjax.CrossLayerEqualization(), qjax.RTN(weights=TENSOR)),
                69.91,
            ),
        ),
        (Less("CrossLayerEqualization", "RTN", 0.2),),
        "imbalanced",
    ),
    "mixed_precision": Paper(
        "HAWQ-V2 (arXiv:1911.03852), ResNet50 of 7.99 MB, percent of ImageNet that is "
        "right (more is better); the abstract names no uniform baseline",
        (
            Row(FLOAT, None),
            Row("GPTQ 3 bits", solved(3)),
            Row("2 to 8 bits by Hessian", mixed("hessian"), 75.92),
            Row("2 to 8 bits by KL", mixed("kl")),
        ),
        (
            Less("2 to 8 bits by Hessian", "GPTQ 3 bits"),
            Less("2 to 8 bits by KL", "GPTQ 3 bits"),
        ),
    ),
}
