"""Linears that servers run as one, and must be stored alike.

vLLM joins the projections of queries, keys and values into one linear, and gate and up,
those of an expert too, into another. It refuses members in different formats; of
NVFP4's second scales, one for each matrix and one for its input, it keeps one for all,
which is wrong unless all are equal. Matrices with one input that are quantized together
are (`qjax/solving.py`); what was imported, trained or put together may not be.
"""

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from qjax.trace.control import QuantizationWarning

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))


@dataclass(frozen=True)
class Stored:
    """How a linear module is stored: its scheme (None: float), and second scales.

    `global_scale` is that of the weights, `input_scale` that of static inputs.
    """

    scheme: Any
    global_scale: float | None = None
    input_scale: float | None = None


def warn_of_unlike(stored: Mapping[str, Stored]) -> None:
    """Say where members of one fused linear differ.

    Args:
      stored: by the modules' names.

    Warns:
      QuantizationWarning: once for schemes, once for second scales of weights and once
        for those of inputs, naming the first modules that differ.
    """
    reasons = {
        "scheme": "in different formats: vLLM, which runs them as one, refuses that",
        "global_scale": (
            "in NVFP4 with different global scales: vLLM, which runs them as one, "
            "takes one of them for both, so that its weights are wrong"
        ),
        "input_scale": (
            "in NVFP4 with different global scales of their inputs: vLLM, which runs "
            "them as one, takes the largest for both"
        ),
    }
    for field, reason in reasons.items():
        for first, other in _members(stored):
            if getattr(stored[first], field) != getattr(stored[other], field):
                warnings.warn(
                    f"{first} and {other} are stored {reason}",
                    QuantizationWarning,
                    stacklevel=4,
                )
                break


def _members(stored: Mapping[str, Stored]) -> Iterator[tuple[str, str]]:
    """Pairs of modules of one fused linear, the first member with every other."""
    for name in stored:
        parent, _, last = name.rpartition(".")
        for first, *others in FUSED:
            if last == first:
                both = (f"{parent}.{other}" for other in others)
                yield from ((name, other) for other in both if other in stored)
