"""compressed-tensors' arguments of a quantization (0.20), as formats of ours."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from qjax.core.formats import (
    MX,
    NVFP4,
    Float,
    Format,
    Granularity,
    Int,
    block,
    channel,
    group,
    tensor,
    token,
)
from qjax.core.qtensor import Activation
from qjax.core.ranges import MinMaxRange, MovingAverageRange, MSERange
from qjax.core.scales import MINMAX, MSE, Search
from qjax.methods import IMatrix

ARGUMENTS = frozenset(
    {"num_bits", "type", "symmetric", "strategy", "group_size", "block_structure"}
    | {"dynamic", "actorder", "scale_dtype", "zp_dtype", "observer", "observer_kwargs"}
)
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


def checked(owner: str, given: Mapping[str, Any], known: Iterable[str]) -> None:
    """Refuse keys that are not known.

    Raises:
      ValueError: naming the first of them and the known ones.
    """
    if not isinstance(given, Mapping):
        raise ValueError(f"{owner}: expected {{key: value}}, got {given!r}")
    for key in given:
        if key not in known:
            raise ValueError(
                f"{owner}: {key!r} is unknown; known are {', '.join(sorted(known))}"
            )


def scheme_of(owner: str, args: Mapping[str, Any]) -> Format:
    """The format of weights `w[K, N]`, which torch keeps as `[N, K]`.

    Raises:
      ValueError: an unknown argument, or a pair of bits and type without counterpart.
    """
    checked(owner, args, ARGUMENTS)
    if args.get("dynamic"):
        raise ValueError(f"{owner}.dynamic must be false for weights")
    strategy = _strategy(args)
    makers = {
        "tensor": tensor,
        "channel": channel,
        "group": lambda: group(args["group_size"]),
        "tensor_group": lambda: group(args["group_size"]),
        "block": lambda: block(*_block(args)[::-1]),
    }
    return _format(owner, args, _known(owner, strategy, makers))


def activation_of(owner: str, args: Mapping[str, Any] | None) -> Activation | None:
    """How inputs are coded; None where the scheme leaves them in float.

    Raises:
      ValueError: as for `scheme_of`.
    """
    if not args:
        return None
    checked(owner, args, ARGUMENTS)
    strategy, dynamic = _strategy(args), args.get("dynamic", False)
    makers = {
        "tensor": tensor,
        "token": token,
        "channel": lambda: block(1, None),
        "group": lambda: group(args["group_size"]),
        "tensor_group": lambda: group(args["group_size"]),
    }
    found = _format(owner, args, _known(owner, strategy, makers))
    return Activation(found, dynamic=dynamic is True)


def _known(owner: str, strategy: str, makers: Mapping[str, Any]) -> Granularity:
    if strategy not in makers:
        raise ValueError(
            f"{owner}.strategy {strategy!r} has no counterpart; known are "
            f"{', '.join(makers)}"
        )
    return makers[strategy]()


def _strategy(args: Mapping[str, Any]) -> str:
    """As compressed-tensors infers it where it is not said."""
    size = args.get("group_size")
    said = args.get("strategy")
    if said is not None:
        return str(said).lower()
    if size is None:
        return "tensor"
    return "channel" if size == -1 else "group"


def _block(args: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns of torch's `[N, K]`."""
    sizes = args["block_structure"]
    sizes = sizes.split("x") if isinstance(sizes, str) else sizes
    rows, cols = (int(size) for size in sizes)
    return rows, cols


def _format(owner: str, args: Mapping[str, Any], shared: Granularity) -> Format:
    bits, kind = args.get("num_bits", 8), str(args.get("type", "int")).lower()
    symmetric = args.get("symmetric", True)
    if kind == "int":
        return Int(bits, shared, symmetric=symmetric)
    powers = str(args.get("scale_dtype", "")).endswith("uint8")
    nested = _strategy(args) == "tensor_group"
    blocks: dict[Any, Any] = {
        (4, 16, False): NVFP4() if nested else None,
        (4, 32, True): MX("fp4", scale_rule="ct"),
        (6, 32, True): MX("fp6_e2m3", scale_rule="ct"),
        (8, 32, True): MX("fp8_e4m3", scale_rule="ct"),
    }
    found = blocks.get((bits, shared.rows, powers))
    if found is None and bits == 8 and not powers:
        found = Float("e4m3", shared)
    if kind != "float" or found is None or not symmetric:
        raise ValueError(
            f"{owner}: {bits} bits of type {kind!r} in {shared.label} have no "
            "counterpart; floats are symmetric: 8 bits, NVFP4 (4 bits, tensor_group of "
            "16) or MX (4, 6 or 8 bits, groups of 32, scale_dtype uint8)"
        )
    return found


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
