"""Recipes by short names, for the command line and for tables.

`rtn-int4-g64`, `hqq-int4-g64`, `gptq-int4-g128` (any method of `INTEGERS`, any bits,
any group size), what `FORMATS` and `SPECIAL` name, and every scheme by its own
name (`W4A16`, `FP8_DYNAMIC`, ...), which then is rounded to nearest.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from qjax.allocate import MixedPrecision
from qjax.core.formats import Float, Int, channel, group
from qjax.methods import (
    AWQ,
    BRECQ,
    EETQ,
    GPTAQ,
    GPTQ,
    HQQ,
    LPLR,
    LQER,
    QEP,
    QERA,
    RPTQ,
    RTN,
    AutoRound,
    BiasCorrection,
    CrossLayerEqualization,
    EfficientQAT,
    IMatrix,
    LLMInt8,
    LoftQ,
    LoRC,
    OmniQuant,
    SequentialMSE,
    SimplePTQ,
    SmoothQuant,
    SVDQuant,
    ZeroQuant,
    ZeroQuantLKD,
)
from qjax.schemes import SCHEMES


@dataclass(frozen=True)
class Named:
    """A recipe with its short name, its label in tables and its curve in pictures."""

    name: str
    label: str
    recipe: Any
    series: str | None = None


# Weights only: activations stay in float. The schemes FP8, MXFP4 and NVFP4 without
# "A16" code activations too.
FORMATS: dict[str, Named] = {
    "nf4": Named("nf4", "NF4 g64", RTN(scheme="NF4")),
    "fp8a16": Named("fp8a16", "FP8 e4m3", RTN(weights=Float("e4m3", channel()))),
    "mxfp4a16": Named("mxfp4a16", "MXFP4", RTN(scheme="MXFP4A16")),
    "nvfp4a16": Named("nvfp4a16", "NVFP4", RTN(scheme="NVFP4A16")),
}
# Beside weights: 8 of 256 features, in 8 bits. Its bits count (1 / K + 1 / N) 64.
RANK, FACTORS = 8, Int(8)
# The papers' steps take hours on a processor; here all learn for as many, each of
# as many sequences.
ITERS, SEQUENCES = 200, 8
BUDGET: Any = {"iters": ITERS, "batch_size": SEQUENCES}
# Integer weights in groups, by a method that takes a format.
INTEGERS: dict[str, tuple[str, Callable[[Int], Any]]] = {
    "rtn": ("RTN", lambda weights: RTN(weights=weights)),
    "imatrix": ("IMatrix", lambda weights: IMatrix(weights=weights)),
    "seqmse": ("SequentialMSE", lambda weights: SequentialMSE(weights=weights)),
    "awq": ("AWQ", lambda weights: AWQ(weights=weights)),
    "gptq": ("GPTQ", lambda weights: GPTQ(weights=weights)),
    "gptaq": ("GPTAQ", lambda weights: GPTAQ(weights=weights)),
    "autoround": ("AutoRound", lambda weights: AutoRound(weights=weights)),
    "qep": ("QEP", lambda weights: QEP(GPTQ(weights=weights))),
    "brecq": ("BRECQ", lambda w: BRECQ(weights=w, lr=0.02, **BUDGET)),
    "omniquant": ("OmniQuant", lambda w: OmniQuant(weights=w, **BUDGET)),
    "efficientqat": (
        "EfficientQAT",
        lambda w: EfficientQAT(weights=w, lr=1e-3, weight_lr=5e-4, **BUDGET),
    ),
    "lkd": ("ZeroQuantLKD", lambda w: ZeroQuantLKD(weights=w, lr=5e-4, **BUDGET)),
    "lorc": ("LoRC", lambda w: LoRC(weights=w, rank=RANK, factors=FACTORS)),
    "lqer": ("LQER", lambda w: LQER(weights=w, rank=RANK, factors=FACTORS)),
    "qera": ("QERA", lambda w: QERA(weights=w, rank=RANK, factors=FACTORS)),
    "loftq": ("LoftQ", lambda w: LoftQ(weights=w, rank=RANK, factors=FACTORS)),
    "gptqera": (
        "GPTQ and QERA",
        lambda w: (GPTQ(weights=w), QERA(rank=RANK, factors=FACTORS)),
    ),
}
INTEGER = re.compile(rf"({'|'.join(('hqq', *INTEGERS))})-int(\d+)-g(\d+)")

# By a name of their own: coded activations, or several formats.
SPECIAL: dict[str, Named] = {
    "eetq": Named("eetq", "EETQ (W8A16)", EETQ()),
    "simple-ptq": Named("simple-ptq", "SimplePTQ W8A8", SimplePTQ()),
    "bias-w8a8": Named(
        "bias-w8a8", "BiasCorrection W8A8", (RTN("W8A8"), BiasCorrection())
    ),
    "cle-w8a8": Named(
        "cle-w8a8",
        "CrossLayerEqualization W8A8",
        (CrossLayerEqualization(), RTN("W8A8")),
    ),
    "smoothquant-w8a8": Named(
        "smoothquant-w8a8", "SmoothQuant W8A8", (SmoothQuant(), RTN("W8A8"))
    ),
    "smoothquant-gptq-w8a8": Named(
        "smoothquant-gptq-w8a8",
        "SmoothQuant and GPTQ W8A8",
        (SmoothQuant(0.8), GPTQ("W8A8")),
    ),
    "llm-int8": Named("llm-int8", "LLM.int8()", LLMInt8()),
    "zeroquant": Named("zeroquant", "ZeroQuant W8A8", ZeroQuant()),
    "lplr": Named("lplr", "LPLR, half the rank in int4", LPLR(0.5, Int(4))),
    "svdquant-w4a4": Named(
        "svdquant-w4a4",
        "SVDQuant W4A4",
        (SmoothQuant(online=True), SVDQuant(RTN("W4A4"), rank=RANK)),
    ),
    "mixed-4": Named(
        "mixed-4",
        "MixedPrecision, GPTQ 2 to 8 bits",
        MixedPrecision(
            tuple(
                GPTQ(weights=Int(bits, group(128), symmetric=False, zero="int"))
                for bits in (2, 3, 4, 8)
            ),
            target_bits=4,
        ),
    ),
    "rptq-w4a8": Named(
        "rptq-w4a8", "RPTQ W4A8", RPTQ(GPTQ(weights=Int(4, group(128))))
    ),
}

# What `qjax compare` runs beside full precision unless told otherwise.
COMPARED: tuple[str, ...] = (
    *(
        f"{method}-int{bits}-g{size}"
        for method in ("rtn", "hqq")
        for size in (64, 128)
        for bits in (8, 4, 3, 2)
    ),
    *FORMATS,
)
# What needs calibration data, or codes activations; `--recipes calibrated`.
CALIBRATED: tuple[str, ...] = (
    *(
        f"{method}-int{bits}-g128"
        for method in ("imatrix", "seqmse", "awq", "gptq", "gptaq", "qep")
        for bits in (4, 3, 2)
    ),
    "W8A8",
    *(name for name in SPECIAL if name not in ("lplr", "svdquant-w4a4")),
)
# A low-rank part beside weights in low bits, or alone; `--recipes lowrank`.
LOWRANK: tuple[str, ...] = (
    *(
        f"{method}-int{bits}-g128"
        for method in ("lorc", "loftq", "lqer", "qera", "gptqera")
        for bits in (3, 2)
    ),
    *("lplr", "W4A4", "svdquant-w4a4"),
)
# What is trained block by block, which takes long; `--recipes blockwise`.
BLOCKWISE: tuple[str, ...] = tuple(
    f"{method}-int{bits}-g128"
    for method in ("autoround", "brecq", "omniquant", "efficientqat", "lkd")
    for bits in (4, 3, 2)
)
GROUPS: dict[str, tuple[str, ...]] = {
    "data-free": COMPARED,
    "calibrated": CALIBRATED,
    "blockwise": BLOCKWISE,
    "lowrank": LOWRANK,
}


def named(name: str) -> Named:
    """The recipe of a short name, in any case of letters.

    All methods of an integer name use asymmetric codes, HQQ with float and the others
    with integer zero points, so that they differ in the method alone.

    >>> named("HQQ-int3-g64").recipe.bits
    3

    Raises:
        ValueError: no such name (the message says which there are), or bits or group
            size out of range.
    """
    key = name.strip().lower()
    if found := INTEGER.fullmatch(key):
        return _integer(key, found[1], int(found[2]), int(found[3]))
    for known in (FORMATS, SPECIAL):
        if key in known:
            return known[key]
    if key.upper() in SCHEMES:
        return Named(key, key.upper(), RTN(scheme=key.upper()))
    raise ValueError(
        f"recipe {name!r} is unknown: give hqq-int4-g64 (or {', '.join(INTEGERS)}; any "
        f"bits and group size), {', '.join((*FORMATS, *SPECIAL))}, or a scheme: "
        f"{', '.join(SCHEMES)}"
    )


def expanded(names: Iterable[str]) -> list[Named]:
    """The recipes of names, of which those of `GROUPS` stand for several."""
    return [named(one) for name in names for one in GROUPS.get(name, (name,))]


def _integer(key: str, method: str, bits: int, size: int) -> Named:
    """All methods but HQQ have asymmetric codes with integer zero points."""
    if method == "hqq":
        label, recipe = "HQQ", HQQ(bits=bits, group_size=size)
    else:
        label, make = INTEGERS[method]
        recipe = make(Int(bits, group(size), symmetric=False, zero="int"))
    return Named(key, f"{label} int{bits} g{size}", recipe, f"{label} g{size}")
