"""Named pairs of weight and activation formats.

The names, groups and granularities are compressed-tensors' presets (version 0.20), so
that a scheme means here what it means in llm-compressor and vLLM. `NF4`, `NF4_DQ`,
`FP4`, `BINARY` and `TERNARY` are ours. Its `UNQUANTIZED` is no format: a site stays in
float by `ignore`.
"""

import difflib
from dataclasses import dataclass

from qjax.core.formats import (
    MX,
    NVFP4,
    Binary,
    Codebook,
    Float,
    Format,
    Int,
    Ternary,
    block,
    channel,
    group,
    tensor,
    token,
)
from qjax.core.qtensor import Activation


@dataclass(frozen=True)
class Scheme:
    """A weight format, and how the input of the contraction is coded (None: not)."""

    weights: Format
    activations: Activation | None = None


_TOKENS = {bits: Activation(Int(bits, token())) for bits in (4, 8)}
_FP8_TOKENS = Activation(Float("e4m3", token()))


def _integer_schemes() -> dict[str, Scheme]:
    """`W{b}A{a}`: groups of 128 along K; activations per token, `a >= b`."""
    weights = {bits: Int(bits, group(128)) for bits in range(2, 9)}
    only = {f"W{bits}A16": Scheme(w) for bits, w in weights.items()}
    both = {
        f"W{bits}A{acts}": Scheme(w, _TOKENS[acts])
        for bits, w in weights.items()
        for acts in (4, 8)
        if bits <= acts
    }
    return only | both


SCHEMES: dict[str, Scheme] = {
    **_integer_schemes(),
    "W4A16_ASYM": Scheme(Int(4, group(128), symmetric=False, zero="int")),
    "W8A8": Scheme(Int(8, channel()), _TOKENS[8]),
    "INT8": Scheme(Int(8, channel()), _TOKENS[8]),
    "W4AFP8": Scheme(Int(4, group(128)), _FP8_TOKENS),
    "FP8": Scheme(
        Float("e4m3", tensor()), Activation(Float("e4m3", tensor()), dynamic=False)
    ),
    "FP8_DYNAMIC": Scheme(Float("e4m3", channel()), _FP8_TOKENS),
    "FP8_BLOCK": Scheme(
        Float("e4m3", block(128, 128)), Activation(Float("e4m3", group(128)))
    ),
    "NVFP4A16": Scheme(NVFP4()),
    "NVFP4": Scheme(NVFP4(), Activation(NVFP4(), dynamic=False)),
    "MXFP4A16": Scheme(MX("fp4", scale_rule="ct")),
    "MXFP4": Scheme(MX("fp4", scale_rule="ct"), Activation(MX("fp4", scale_rule="ct"))),
    "MXFP4XFP8": Scheme(
        MX("fp4", scale_rule="ct"), Activation(Float("e4m3", group(128)))
    ),
    "MXFP6A16": Scheme(MX("fp6_e2m3", scale_rule="ct")),
    "MXFP6A8": Scheme(
        MX("fp6_e2m3", scale_rule="ct"), Activation(MX("fp8_e4m3", scale_rule="ct"))
    ),
    "MXFP8A16": Scheme(MX("fp8_e4m3", scale_rule="ct")),
    "MXFP8": Scheme(
        MX("fp8_e4m3", scale_rule="ct"), Activation(MX("fp8_e4m3", scale_rule="ct"))
    ),
    "NF4": Scheme(Codebook("nf4", granularity=group(64))),
    "NF4_DQ": Scheme(Codebook("nf4", granularity=group(64), double_quant=256)),
    "FP4": Scheme(Codebook("fp4", granularity=group(64))),
    "BINARY": Scheme(Binary()),
    "TERNARY": Scheme(Ternary()),
}


def scheme(name: str) -> Scheme:
    """The scheme of that name, in any case of letters.

    >>> scheme("W8A8").weights.bits
    8

    Raises:
        ValueError: no such name; the message lists those there are.
    """
    found = SCHEMES.get(name.upper())
    if found is None:
        close = difflib.get_close_matches(name.upper(), SCHEMES, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(
            f"unknown scheme {name!r}; {hint}known schemes: {', '.join(SCHEMES)}"
        )
    return found
