"""What is said of solved sites, and what of them is refused."""

from collections.abc import Sequence
from math import sqrt

import numpy as np

from qjax.report import SiteReport
from qjax.sitesolver import Problem, Result

NOTHING_SEEN = "no samples reached it: its input was taken as white noise"
ALL_RANGES = ", its range as that of all experts"


def check(
    problems: Sequence[Problem], solved: Sequence[Result], where: str = "", bad: int = 0
) -> None:
    """Refuse weights and activations that are not finite.

    Args:
      problems, solved: the sites.
      where: the activation that was looked at.
      bad: how many of its values are not finite.

    Raises:
        ValueError: naming the site and how many values.
    """
    for problem, each in zip(problems, solved):
        unfit = int(each.numbers["bad_weights"].sum())
        if unfit:
            raise ValueError(
                f"{problem.name} holds {unfit} NaN or Inf of {problem.w.size} values; "
                "quantize finite weights"
            )
    if bad:
        raise ValueError(
            f"{where} holds {bad} NaN or Inf in calibration; "
            "calibrate with inputs for which the model is finite"
        )


def check_ranges(
    problems: Sequence[Problem], solved: Sequence[Result], coded: Sequence[bool]
) -> None:
    """Refuse static ranges of inputs that were never seen.

    Args:
      problems, solved: the sites.
      coded: whether each of them codes its input.

    Raises:
        ValueError: naming the site.
    """
    for problem, each, used in zip(problems, solved, coded):
        if used and _static(problem) and not each.numbers["tokens"].any():
            raise ValueError(
                f"no sample reached {problem.name}, so the range of its input is "
                "unknown; calibrate with inputs that reach it, leave it out with "
                "ignore, or take a scheme with dynamic activations"
            )


def _static(problem: Problem) -> bool:
    activation = problem.method.activation
    return activation is not None and not activation.dynamic


def site_report(
    problem: Problem, each: Result, seconds: float, remark: str
) -> SiteReport:
    """A row of the report."""
    tokens = each.numbers["tokens"].reshape(-1)
    remarks = [remark] if remark else []
    starved = int((tokens == 0).sum())
    if starved == tokens.size:
        remarks.append(NOTHING_SEEN)
    elif starved:
        ranges = ALL_RANGES if _static(problem) else ""
        remarks.append(f"{starved} of {tokens.size} experts: {NOTHING_SEEN}{ranges}")
    notes = {name: float(np.max(v)) for name, v in each.numbers["notes"].items()}
    norm = float(each.numbers["norm"].sum())

    def relative(name: str) -> float:
        error = max(float(each.numbers[name].sum()), 0.0)
        return sqrt(error / norm) if norm else 0.0

    return SiteReport(
        problem.name,
        type(problem.method).__name__,
        problem.method.format.name,
        int(tokens.min()),
        relative("error_before"),
        relative("error"),
        each.measured,
        seconds,
        notes,
        "; ".join(remarks),
    )
