"""compressed-tensors' `quantization_config`, checked option by option."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qjax.core.formats import MX, NVFP4, Float, Format, Int, tensor
from qjax.core.qtensor import Activation
from qjax.io.compressed_arguments import activation_of, scheme_of
from qjax.io.modules import checked

KNOWN = {
    *("config_groups", "format", "global_compression_ratio", "ignore"),
    *("kv_cache_scheme", "quant_method", "quantization_status", "run_compressed"),
    *("moe_sparsity_config", "sparsity_config", "transform_config", "version"),
}
GROUP = {"targets", "weights", "input_activations", "output_activations", "format"}
FORMATS: dict[str, tuple[type, ...]] = {
    "pack-quantized": (Int,),
    "int-quantized": (Int,),
    "float-quantized": (Float,),
    "naive-quantized": (Int, Float),
    "nvfp4-pack-quantized": (NVFP4,),
    "mxfp4-pack-quantized": (MX,),
    "mxfp8-quantized": (MX,),
}
OWNER = "config.json: quantization_config"


@dataclass(frozen=True)
class Group:
    """One entry of `config_groups`: which modules, and how they are stored."""

    targets: tuple[str, ...]
    kind: str
    format: Format
    activation: Activation | None
    reordered: bool


@dataclass(frozen=True)
class Config:
    """Which modules are quantized, and how."""

    groups: tuple[Group, ...]
    ignore: tuple[str, ...]
    coded_cache: bool = False

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> "Config":
        """From the configuration.

        Raises:
          ValueError: an option that is not known or not supported, named.
        """
        checked(OWNER, raw, KNOWN)
        _check_rest(raw)
        found = raw.get("config_groups")
        cache = codes_cache(f"{OWNER}.kv_cache_scheme", raw.get("kv_cache_scheme"))
        if not isinstance(found, Mapping) or not (found or cache):
            raise ValueError(f"{OWNER}.config_groups is {found!r}, expected groups")
        groups = tuple(_group(name, group, raw) for name, group in found.items())
        return cls(groups, _texts("ignore", raw.get("ignore") or ()), cache)

    def group(self, module: str) -> Group | None:
        """The group that names the module most closely, as compressed-tensors does."""
        if _rank(module, self.ignore) is not None:
            return None
        ranks = [(_rank(module, group.targets), group) for group in self.groups]
        found = [(rank, group) for rank, group in ranks if rank is not None]
        return min(found, key=lambda pair: pair[0])[1] if found else None


def _check_rest(raw: Mapping[str, Any]) -> None:
    """Refuse what changes the numbers and has no counterpart."""
    if raw.get("quantization_status", "compressed") != "compressed":
        status = raw["quantization_status"]
        raise ValueError(
            f"{OWNER}.quantization_status is {status!r}, but only 'compressed' weights "
            "are supported"
        )
    if raw.get("moe_sparsity_config"):
        found = raw["moe_sparsity_config"]
        raise ValueError(f"{OWNER}.moe_sparsity_config is {found!r}, supported is null")
    sparse = raw.get("sparsity_config") or {}
    if not isinstance(sparse, Mapping) or sparse.get("format", "dense") != "dense":
        raise ValueError(f"{OWNER}.sparsity_config is {sparse!r}, expected none")
    for name, group in _transforms(raw):
        if any(not str(a["location"]).startswith("weight_") for a in group["apply"]):
            raise ValueError(
                f"{OWNER}.transform_config: {name} transforms activations as the model "
                "runs, but only transforms folded into weights are supported"
            )


def codes_cache(owner: str, scheme: Any) -> bool:
    """Whether keys and values are coded, as float8 on one static scale for each.

    Raises:
      ValueError: they are coded otherwise; `owner` names where that is said.
    """
    if not scheme:
        return False
    found = activation_of(owner, scheme)
    if found != Activation(Float("e4m3", tensor()), dynamic=False):
        assert found is not None
        kind = "dynamic" if found.dynamic else "static"
        raise ValueError(
            f"{owner} is {kind} {found.format.name}, supported is float8 with one "
            "static scale for the keys of a layer and one for its values"
        )
    return True


def _transforms(raw: Mapping[str, Any]) -> list[tuple[str, Any]]:
    found = raw.get("transform_config") or {}
    try:
        groups = dict(found.get("config_groups") or {})
        assert all("location" in a for g in groups.values() for a in g["apply"])
    except (AttributeError, KeyError, TypeError, ValueError, AssertionError):
        raise ValueError(
            f"{OWNER}.transform_config is {found!r}, which cannot be read"
        ) from None
    return list(groups.items())


def _group(name: str, raw: Any, whole: Mapping[str, Any]) -> Group:
    owner = f"{OWNER}.{name}"
    checked(owner, raw, GROUP)
    if raw.get("output_activations"):
        raise ValueError(f"{owner}.output_activations must be null: none is supported")
    kind = raw.get("format") or whole.get("format")
    if not isinstance(kind, str) or kind not in FORMATS:
        raise ValueError(
            f"{owner}.format is {kind!r}, supported are {', '.join(FORMATS)}"
        )
    weights = raw.get("weights")
    if not isinstance(weights, Mapping):
        raise ValueError(f"{owner}.weights is {weights!r}, expected arguments")
    format = scheme_of(f"{owner}.weights", weights)
    if not isinstance(format, FORMATS[kind]) or (
        isinstance(format, MX) and format.bits != (4 if "fp4" in kind else 8)
    ):
        raise ValueError(f"{owner}.format is {kind!r}, which holds no {format.name}")
    activation = activation_of(
        f"{owner}.input_activations", raw.get("input_activations")
    )
    _check_static(owner, activation)
    order = weights.get("actorder")
    if order not in (None, False, "weight", "static", "group", "dynamic"):
        raise ValueError(f"{owner}.weights.actorder is {order!r}, which is not known")
    reordered = order in ("group", "dynamic")
    targets = _texts(f"{name}.targets", raw.get("targets"))
    return Group(targets, kind, format, activation, reordered)


def _check_static(owner: str, activation: Activation | None) -> None:
    if activation is None or activation.dynamic or isinstance(activation.format, NVFP4):
        return
    found = activation.format.granularity
    if (found.rows, found.cols) != (None, None):
        raise ValueError(
            f"{owner}.input_activations: static ranges in {found.label} are not "
            "supported, only 'tensor'"
        )


def _texts(name: str, found: Any) -> tuple[str, ...]:
    if not isinstance(found, (list, tuple)) or not all(
        isinstance(x, str) for x in found
    ):
        raise ValueError(f"{OWNER}.{name} is {found!r}, expected a list of names")
    for text in found:
        try:
            re.compile(text.removeprefix("re:") if text.startswith("re:") else "")
        except re.error as error:
            raise ValueError(
                f"{OWNER}.{name}: {text!r} is no regular expression: {error}"
            ) from None
    return tuple(found)


def _rank(module: str, patterns: tuple[str, ...]) -> int | None:
    """0 for its name, 1 for an expression, 2 for its class, None for no match."""
    if module in patterns:
        return 0
    if any(p.startswith("re:") and re.match(p[3:], module) for p in patterns):
        return 1
    return 2 if "Linear" in patterns else None
