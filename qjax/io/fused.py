"""Linears that servers run as one, and must be stored alike.

vLLM joins the projections of queries, keys and values into one linear, and gate and up,
those of an expert too, into another. It refuses members in different formats; of
NVFP4's second scales, one for each matrix and one for its input, it keeps one for all,
which is wrong unless all are equal. Matrices with one input that one step quantizes or
trains are (`qjax/solving.py`, `qjax/train/joined.py`, `qjax/blocksolver.py`); what was
imported or put together may not be, and is refused.
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


def refuse_unlike(stored: Mapping[str, Stored], name: str) -> None:
    """Refuse weights that one linear of vLLM cannot hold.

    Args:
      stored: by the modules' names.
      name: the module that was stored last.

    Raises:
      ValueError: its weights and those of an earlier member of its fused linear have
        different second scales.
    """
    second = stored[name].global_scale
    for other in _members(name):
        known = stored[other].global_scale if other in stored else None
        if known is not None and second is not None and known != second:
            raise ValueError(
                f"{other} and {name} are in NVFP4 with different global scales, "
                f"{known:.9g} and {second:.9g}, of which vLLM, which runs them as one "
                "linear, takes one for both; quantize both in one step, such as "
                "RTN('NVFP4'), which gives them one"
            )


def warn_of_unlike(stored: Mapping[str, Stored]) -> None:
    """Say where members of one fused linear differ.

    Args:
      stored: by the modules' names.

    Warns:
      QuantizationWarning: once for schemes and once for second scales of inputs, naming
        the first modules that differ.
    """
    reasons = {
        "scheme": "in different formats: vLLM, which runs them as one, refuses that",
        "input_scale": (
            "in NVFP4 with different global scales of their inputs: vLLM, which runs "
            "them as one, takes the largest for both"
        ),
    }
    for field, reason in reasons.items():
        for first, other in _pairs(stored):
            if getattr(stored[first], field) != getattr(stored[other], field):
                warnings.warn(
                    f"{first} and {other} are stored {reason}",
                    QuantizationWarning,
                    stacklevel=4,
                )
                break


def _members(name: str) -> list[str]:
    """The modules of a fused linear, the one of this name included."""
    parent, _, last = name.rpartition(".")
    groups = (members for members in FUSED if last in members)
    return [f"{parent}.{other}" for other in next(groups, ())]


def _pairs(stored: Mapping[str, Stored]) -> Iterator[tuple[str, str]]:
    """Pairs of modules of one fused linear, the first member with every other."""
    for name in stored:
        first, *others = _members(name) or [""]
        if name == first:
            yield from ((name, other) for other in others if other in stored)
