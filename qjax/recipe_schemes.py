"""compressed-tensors' arguments of a quantization (0.20), as searches of ours."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from qjax.core.ranges import MinMaxRange, MovingAverageRange, MSERange
from qjax.core.scales import MINMAX, MSE, Search
from qjax.io.modules import checked
from qjax.methods import IMatrix

SEARCHES: dict[Any, tuple[Search, bool]] = {
    None: (MINMAX, False),
    "minmax": (MINMAX, False),
    "memoryless_minmax": (MINMAX, False),
    "static_minmax": (MINMAX, False),
    "mse": (MSE(), False),
    "memoryless_mse": (MSE(), False),
    "imatrix_mse": (IMatrix().search, True),
}
CALIBRATORS: dict[str, Any] = {
    "minmax": MovingAverageRange(),
    "static_minmax": MinMaxRange(),
    "memoryless_minmax": MinMaxRange(),
    "mse": MSERange(),
    "memoryless_mse": MSERange(),
}


def search_of(
    owner: str, observer: Any, args: Mapping[str, Any]
) -> tuple[Search, bool]:
    """The search of weight ranges, and whether inputs weigh its error.

    Raises:
      ValueError: an observer or an argument of it without counterpart.
    """
    said = observer if observer is not None else args.get("observer")
    if said not in SEARCHES:
        raise ValueError(
            f"{owner}: weight observer {said!r} has no counterpart; known are "
            f"{', '.join(str(each) for each in SEARCHES if each)}"
        )
    search, importance = SEARCHES[said]
    own = args.get("observer_kwargs") or {}
    if isinstance(search, MSE):
        checked(f"{owner}.observer_kwargs", own, {"maxshrink", "grid", "norm"})
        numbers = {k: int(v) if k == "grid" else v for k, v in own.items()}
        return replace(search, **numbers), importance
    checked(f"{owner}.observer_kwargs", own, {"averaging_constant"})
    return search, importance


def calibrator_of(owner: str, observer: Any, args: Mapping[str, Any]) -> Any:
    """What finds a static range of inputs.

    Raises:
      ValueError: an observer or an argument of it without counterpart.
    """
    if observer not in CALIBRATORS:
        raise ValueError(
            f"{owner}: input observer {observer!r} has no counterpart; known are "
            f"{', '.join(CALIBRATORS)}"
        )
    own = args.get("observer_kwargs") or {}
    checked(f"{owner}.observer_kwargs", own, {"averaging_constant"})
    if observer == "minmax" and own:
        return MovingAverageRange(own["averaging_constant"])
    return CALIBRATORS[observer]
