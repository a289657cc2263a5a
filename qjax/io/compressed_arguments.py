"""compressed-tensors' arguments of a quantization (0.20) and formats of ours."""

from collections.abc import Mapping
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
from qjax.io.modules import checked

ARGUMENTS = frozenset(
    {"num_bits", "type", "symmetric", "strategy", "group_size", "block_structure"}
    | {"dynamic", "actorder", "scale_dtype", "zp_dtype", "observer", "observer_kwargs"}
)


def scheme_of(owner: str, args: Mapping[str, Any]) -> Format:
    """The format of weights `w[K, N]`, which torch keeps as `[N, K]`.

    Raises:
      ValueError: an unknown argument, or a pair of bits and type without counterpart.
    """
    _check_values(owner, args)
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


def activation_of(owner: str, args: Any) -> Activation | None:
    """How inputs are coded; None where the scheme leaves them in float.

    Raises:
      ValueError: as for `scheme_of`.
    """
    if not args:
        return None
    _check_values(owner, args)
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


def _check_values(owner: str, args: Any) -> None:
    """Refuse unknown arguments, and those of a wrong type or that others ask for."""
    checked(owner, args, ARGUMENTS)
    size, bits = args.get("group_size"), args.get("num_bits", 8)
    dynamic, symmetric = args.get("dynamic", False), args.get("symmetric", True)
    grouped = _strategy(args) in ("group", "tensor_group")
    valid = {
        "num_bits": (_whole(bits) and 1 <= bits <= 8, "a whole number from 1 to 8"),
        "group_size": (
            _whole(size) and (size or 0) > 0
            if grouped
            else size is None or _whole(size),
            "a positive whole number",
        ),
        "dynamic": (dynamic in (True, False, None, "local"), "true or false"),
        "symmetric": (isinstance(symmetric, bool), "true or false"),
    }
    for name, (fits, wanted) in valid.items():
        if not fits:
            raise ValueError(f"{owner}.{name} is {args.get(name)!r}, expected {wanted}")


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


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
    sizes = args.get("block_structure")
    sizes = sizes.split("x") if isinstance(sizes, str) else sizes
    try:
        rows, cols = (int(size) for size in sizes or ())
    except (TypeError, ValueError):
        raise ValueError(
            f"block_structure is {sizes!r}, expected [rows, columns]"
        ) from None
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


def weight_arguments(path: str, format: Format) -> dict[str, Any]:
    """The arguments that say how weights `w[K, N]` are stored.

    Raises:
      ValueError: compressed-tensors has none for this format; the message names the
        leaf.
    """
    rows, cols = format.granularity.rows, format.granularity.cols
    named = {(None, None): "tensor", (None, 1): "channel"}
    grouped = "group" if cols == 1 else "block"
    strategy = named.get((rows, cols)) or (grouped if rows and cols else None)
    if strategy is None or (strategy == "block" and isinstance(format, Int)):
        raise _without_counterpart(path, f"weights in {format.name}")
    found = _arguments(path, "weights", format, strategy)
    return found | {"block_structure": [cols, rows] if strategy == "block" else None}


def input_arguments(path: str, activation: Activation | None) -> dict[str, Any] | None:
    """The arguments that say how a linear's input is coded.

    Raises:
      ValueError: as for `weight_arguments`.
    """
    if activation is None:
        return None
    format, dynamic = activation.format, activation.dynamic
    kind = f"{'dynamic' if dynamic else 'static'} inputs in {format.name}"
    rows, cols = format.granularity.rows, format.granularity.cols
    narrow = getattr(format, "scale_rule", "ct") != "ct"
    nested = isinstance(format, NVFP4)
    # Scales of a batch are made by the reader, in its own way.
    if activation.outliers is not None or narrow or (nested and dynamic):
        raise _without_counterpart(path, kind)
    strategies: dict[tuple[int | None, int | None], str] = {(None, None): "tensor"}
    if dynamic or nested:
        strategies |= {(None, 1): "token", (rows, 1): "group" if rows else "token"}
    strategy = strategies.get((rows, cols))
    if strategy is None:
        raise _without_counterpart(path, kind)
    found = _arguments(path, kind, format, strategy)
    return found | {"dynamic": "local" if nested else dynamic, "block_structure": None}


def _arguments(path: str, kind: str, format: Format, strategy: str) -> dict[str, Any]:
    whole = isinstance(format, Int) and format.zero != "float" and format.bits > 1
    eight = isinstance(format, Float) and format.dtype == "e4m3"
    block = isinstance(format, MX) and format.element in ("fp4", "fp8_e4m3")
    nested = isinstance(format, NVFP4)
    if not (whole or eight or block or nested):
        raise _without_counterpart(path, f"{kind} in {format.name}")
    symmetric = not isinstance(format, Int) or bool(format.symmetric)
    scales = {MX: "torch.uint8", NVFP4: "torch.float8_e4m3fn"}
    return {
        "actorder": None,
        "dynamic": False,
        "group_size": format.granularity.rows if strategy == "group" else None,
        "num_bits": format.bits,
        "observer": None,
        "observer_kwargs": {},
        "scale_dtype": scales.get(type(format)),
        "strategy": "tensor_group" if nested else strategy,
        "symmetric": symmetric,
        "type": "int" if isinstance(format, Int) else "float",
        "zp_dtype": None if symmetric else "torch.int8",
    }


def _without_counterpart(path: str, what: str) -> ValueError:
    return ValueError(
        f"{path} has {what}, which compressed-tensors has no arguments for"
    )
