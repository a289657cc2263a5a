"""Recipes by short names, for the command line and for tables.

`rtn-int4-g64` and `hqq-int4-g64` (any bits, any group size), the formats of
`FORMATS`, and every scheme by its own name (`W4A16`, `FP8_DYNAMIC`, ...), which then
is rounded to nearest.
"""

import re
from dataclasses import dataclass
from typing import Any

from qjax.core.formats import Float, Int, channel, group
from qjax.methods import HQQ, RTN
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
INTEGER = re.compile(r"(rtn|hqq)-int(\d+)-g(\d+)")

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

    Both methods of an integer name use asymmetric codes, RTN with integer and HQQ with
    float zero points, so that they differ in the method alone.

    >>> named("HQQ-int3-g64").recipe.bits
    3

    Raises:
        ValueError: no such name (the message says which there are), or bits or group
            size out of range.
    """
    key = name.strip().lower()
    if found := INTEGER.fullmatch(key):
        return _integer(key, found[1].upper(), int(found[2]), int(found[3]))
    if key in FORMATS:
        return FORMATS[key]
    if key.upper() in SCHEMES:
        return Named(key, key.upper(), RTN(scheme=key.upper()))
    raise ValueError(
        f"recipe {name!r} is unknown: give rtn-int4-g64, hqq-int4-g64 (any bits and "
        f"group size), {', '.join(FORMATS)}, or a scheme: {', '.join(SCHEMES)}"
    )


def _integer(key: str, method: str, bits: int, size: int) -> Named:
    if method == "HQQ":
        recipe = HQQ(bits=bits, group_size=size)
    else:
        recipe = RTN(weights=Int(bits, group(size), symmetric=False, zero="int"))
    return Named(key, f"{method} int{bits} g{size}", recipe, f"{method} g{size}")
