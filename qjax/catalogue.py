"""Recipes by short names, for the command line and for tables.

`rtn-int4-g64`, `hqq-int4-g64`, `gptq-int4-g128` and `awq-int4-g128` (any bits, any
group size), `smoothquant-w8a8`, the formats of `FORMATS`, and every scheme by its own
name (`W4A16`, `FP8_DYNAMIC`, ...), which then is rounded to nearest. GPTQ, AWQ and
SmoothQuant need calibration data.
"""

import re
from dataclasses import dataclass
from typing import Any

from qjax.core.formats import Float, Int, channel, group
from qjax.methods import AWQ, GPTQ, HQQ, RTN, SmoothQuant
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
INTEGER = re.compile(r"(rtn|hqq|gptq|awq)-int(\d+)-g(\d+)")

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
        return _integer(key, found[1].upper(), int(found[2]), int(found[3]))
    if key == "smoothquant-w8a8":
        return Named(key, "SmoothQuant W8A8", (SmoothQuant(), RTN("W8A8")))
    if key in FORMATS:
        return FORMATS[key]
    if key.upper() in SCHEMES:
        return Named(key, key.upper(), RTN(scheme=key.upper()))
    raise ValueError(
        f"recipe {name!r} is unknown: give rtn-int4-g64, hqq-int4-g64 (or gptq, awq; "
        f"any bits and group size), smoothquant-w8a8, {', '.join(FORMATS)}, or a "
        f"scheme: {', '.join(SCHEMES)}"
    )


def _integer(key: str, method: str, bits: int, size: int) -> Named:
    if method == "HQQ":
        recipe = HQQ(bits=bits, group_size=size)
    else:
        weights = Int(bits, group(size), symmetric=False, zero="int")
        recipe = {"RTN": RTN, "GPTQ": GPTQ, "AWQ": AWQ}[method](weights=weights)
    return Named(key, f"{method} int{bits} g{size}", recipe, f"{method} g{size}")
