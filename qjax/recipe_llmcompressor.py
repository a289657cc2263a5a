"""llm-compressor's recipes (0.14): stages of modifiers, as steps of ours.

    quant_stage:
      quant_modifiers:
        GPTQModifier: {targets: Linear, scheme: W4A16, ignore: [lm_head]}

Modifiers become AWQ, SmoothQuant, RTN, GPTQ, AutoRound, and IMatrix where the observer
says so; `kv_cache_scheme` becomes KVCache. Two things are not taken over, since the
traced program tells them: which layers feed which (`mappings`, with a warning) and how
the model is cut (`sequential_targets`). Routers of experts stay in float unless a
pattern names them.
Defaults are those of llm-compressor 0.14, which for GPTQ's `actorder` are newer than
many recipes.
"""

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qjax.core.formats import Int
from qjax.core.scales import MINMAX, MSE
from qjax.io.compressed_arguments import activation_of, scheme_of
from qjax.io.compressed_config import codes_cache
from qjax.io.modules import checked
from qjax.methods import AWQ, GPTQ, RTN, AutoRound, IMatrix, SmoothQuant
from qjax.models.coded_cache import KVCache
from qjax.recipe_modules import Modules, ignored, resolved
from qjax.recipe_schemes import calibrator_of, search_of
from qjax.schemes import Scheme, scheme
from qjax.trace.control import QuantizationWarning

# Where these stand, no code changes.
IDLE = frozenset(
    {"group", "index", "start", "end", "update", "batched_quantization"}
    | {"enable_torch_compile", "device_ids"}
    | {"offload_device", "offload_hessians", "max_chunk_memory"}
    | {"sequential_update", "sequential_targets", "num_calibration_steps"}
    | {"bypass_divisibility_checks", "initialized_", "finalized_"}
)
QUANTIZES = frozenset(
    {"targets", "ignore", "scheme", "config_groups", "kv_cache_scheme"}
    | {"weight_observer", "input_observer", "output_observer", "observer"}
)
KNOWN: dict[str, frozenset[str]] = {
    "QuantizationModifier": QUANTIZES,
    "GPTQModifier": QUANTIZES | {"dampening_frac", "block_size", "actorder"},
    "AWQModifier": QUANTIZES | {"n_grid", "duo_scaling", "mappings"},
    "SmoothQuantModifier": frozenset(
        {"smoothing_strength", "mappings", "ignore", "algorithm"}
        | {"calibration_function"}
    ),
    "AutoRoundModifier": QUANTIZES | {"iters", "lr", "batch_size", "disable_opt_rtn"},
}
ORDERS: dict[Any, str] = {
    None: "off",
    False: "off",
    "weight": "static",
    "static": "static",
    "group": "dynamic",
    "dynamic": "dynamic",
}
_UNSAID = "unsaid"


def is_stages(data: Any) -> bool:
    """Whether this is a recipe of llm-compressor's: `{name_stage: ...}`."""
    return isinstance(data, Mapping) and any(
        isinstance(key, str) and key.endswith("_stage") for key in data
    )


def steps_of_stages(
    data: Mapping[str, Any], model: str | os.PathLike[str] | None = None
) -> tuple[Any, ...]:
    """The steps of all stages, in order.

    Args:
      data: `{name_stage: {name_modifiers: {Modifier: {field: value}}}}`.
      model: the Hugging Face folder or id of the model whose modules are named.

    Raises:
      ValueError: an unknown modifier or key, a value without counterpart, or a pattern
        that needs `model`.
    """
    modules = None if model is None else Modules.of(model)
    steps: list[Any] = []
    for name, stage in data.items():
        if name == "args" and not stage:
            continue
        if not str(name).endswith("_stage") or not isinstance(stage, Mapping):
            raise ValueError(f"expected stages, {{name_stage: ...}}, got {name!r}")
        for group, modifiers in stage.items():
            ours = str(group).endswith("_modifiers") and isinstance(modifiers, Mapping)
            if not ours:
                raise ValueError(
                    f"{name}: expected {{name_modifiers: ...}}, got {group!r}"
                )
            for modifier, given in modifiers.items():
                steps += _steps(str(modifier), given or {}, modules)
    if not steps:
        raise ValueError("the recipe has no modifier")
    rest = tuple(step for step in steps if step != KVCache())
    return (KVCache(), *rest) if KVCache() in steps else rest


def _steps(name: str, given: Mapping[str, Any], modules: Modules | None) -> list[Any]:
    """What one modifier becomes."""
    if name not in KNOWN:
        raise ValueError(f"modifier {name!r} is unknown; known are {', '.join(KNOWN)}")
    given = {k: v for k, v in given.items() if k not in IDLE}
    checked(name, given, KNOWN[name])
    if given.get("mappings") is not None:
        warnings.warn(
            f"{name}.mappings is not used: the traced program tells which layers "
            "feed which",
            QuantizationWarning,
            stacklevel=4,
        )
    cached = _codes_cache(name, given.get("kv_cache_scheme"))
    steps = _BUILDERS[name](name, given, modules)
    return [KVCache(), *steps] if cached else steps


def _codes_cache(name: str, scheme: Any) -> bool:
    """Whether keys and values are coded; only the largest of them make a range."""
    owner = f"{name}.kv_cache_scheme"
    if not codes_cache(owner, scheme):
        return False
    observer = scheme.get("observer", "minmax")
    if observer not in ("minmax", "static_minmax", None):
        raise ValueError(
            f"{owner}.observer {observer!r} has no counterpart; known are minmax and "
            "static_minmax"
        )
    if observer != "static_minmax":
        warnings.warn(
            f"{owner}: the largest key and value of all batches are taken, as observer "
            "'static_minmax' does; llm-compressor's 'minmax' averages over batches",
            QuantizationWarning,
            stacklevel=5,
        )
    return True


def _smoothquant(
    name: str, given: Mapping[str, Any], modules: Modules | None
) -> list[Any]:
    if given.get("algorithm", "smoothquant") != "smoothquant":
        raise ValueError(
            f"{name}.algorithm {given['algorithm']!r} has no counterpart; only "
            "'smoothquant'"
        )
    if given.get("calibration_function") is not None:
        raise ValueError(f"{name}.calibration_function must be null")
    ignore = ignored(name, given.get("ignore") or [], modules)
    # llm-compressor measures max - min, where the paper has the largest magnitude.
    strength = given.get("smoothing_strength", 0.5)
    return [SmoothQuant(strength, span=True, ignore=ignore)]


def _awq(name: str, given: Mapping[str, Any], modules: Modules | None) -> list[Any]:
    """The transform; and its quantizer, in the form that older versions had."""
    own = {k: given[k] for k in ("n_grid", "duo_scaling") if k in given}
    ignore = ignored(name, _listed(given.get("ignore")), modules)
    rest = {k: v for k, v in given.items() if k in QUANTIZES}
    quantizes = rest.get("scheme") is not None or rest.get("config_groups")
    after = _quantization(name, rest, modules) if quantizes else []
    return [AWQ(**own, ignore=ignore), *after]


def _quantization(
    name: str, given: Mapping[str, Any], modules: Modules | None
) -> list[Any]:
    return [
        (IMatrix if each.importance else RTN)(**each.options)
        for each in _groups(name, given, modules)
    ]


def _gptq(name: str, given: Mapping[str, Any], modules: Modules | None) -> list[Any]:
    own: dict[str, Any] = {}
    if given.get("dampening_frac") is not None:
        own["damping"] = given["dampening_frac"]
    if "block_size" in given:
        own["block_size"] = given["block_size"]
    steps = []
    for each in _groups(name, given, modules):
        order = given.get("actorder", each.order)
        if order != _UNSAID:
            own["act_order"] = _order(name, order)
        if each.importance:
            own["importance"] = True
        steps.append(GPTQ(**own, **each.options))
    return steps


def _autoround(
    name: str, given: Mapping[str, Any], modules: Modules | None
) -> list[Any]:
    """Formats as they are named; ranges are learned, so that observers have no part."""
    fields = ("iters", "lr", "batch_size")
    own = {k: given[k] for k in fields if given.get(k) is not None}
    steps = []
    for each in _groups(name, given, modules):
        options = dict(each.options)
        if {"search", "calibrator"} & set(options) or each.importance:
            raise ValueError(
                f"{name} learns the ranges of weights, and activations may only have "
                "dynamic ones; leave out observers and static activations"
            )
        weights = options.get("weights")
        if isinstance(weights, Int) and weights.symmetric:
            options["weights"] = replace(weights, scale_rule="signed")
        steps.append(AutoRound(**own, **options))
    return steps


def _order(name: str, order: Any) -> str:
    if order not in ORDERS:
        raise ValueError(
            f"{name}.actorder {order!r} is unknown; known are "
            f"{', '.join(map(repr, ORDERS))}"
        )
    return ORDERS[order]


_BUILDERS = {
    "QuantizationModifier": _quantization,
    "GPTQModifier": _gptq,
    "AWQModifier": _awq,
    "SmoothQuantModifier": _smoothquant,
    "AutoRoundModifier": _autoround,
}


@dataclass(frozen=True)
class Grouped:
    """A group of modules with one scheme.

    `options` of the quantizer; `order` as the scheme says it; `importance`: whether the
    observer weighs the error by the inputs.
    """

    options: Mapping[str, Any]
    order: Any
    importance: bool


def _groups(
    name: str, given: Mapping[str, Any], modules: Modules | None
) -> list[Grouped]:
    """The schemes that a modifier names, each with its patterns."""
    named, groups = given.get("scheme"), given.get("config_groups")
    if (named is None) == (not groups):
        raise ValueError(f"{name} needs scheme or config_groups, one of them")
    ignore = _listed(given.get("ignore"))
    observers = _observers(name, given)
    if groups:
        return [
            _config_group(f"{name}.{key}", group, ignore, observers, modules)
            for key, group in groups.items()
        ]
    presets = named if isinstance(named, Mapping) else {named: given.get("targets")}
    found = []
    for preset, targets in presets.items():
        patterns = resolved(name, _listed(targets) or ["Linear"], ignore, modules)
        options = {"scheme": str(preset).upper(), **patterns}
        found.append(_observed(name, scheme(str(preset)), options, observers, {}))
    return found


def _config_group(
    name: str,
    group: Mapping[str, Any],
    ignore: Sequence[str],
    observers: Mapping[str, Any],
    modules: Modules | None,
) -> Grouped:
    known = {"targets", "weights", "input_activations", "output_activations", "format"}
    checked(name, group, known)
    if group.get("output_activations"):
        raise ValueError(f"{name}.output_activations has no counterpart")
    if not group.get("weights"):
        raise ValueError(f"{name}.weights is missing: only weights make a group")
    pair = Scheme(
        scheme_of(f"{name}.weights", group["weights"]),
        activation_of(f"{name}.input_activations", group.get("input_activations")),
    )
    targets = _listed(group.get("targets")) or ["Linear"]
    options = {
        "weights": pair.weights,
        "activations": pair.activations,
        **resolved(name, targets, ignore, modules),
    }
    return _observed(name, pair, options, observers, group)


def _observed(
    name: str,
    pair: Scheme,
    options: dict[str, Any],
    observers: Mapping[str, Any],
    group: Mapping[str, Any],
) -> Grouped:
    """With the search and the calibrator that the observers stand for."""
    weights = group.get("weights") or {}
    inputs = group.get("input_activations") or {}
    search, importance = search_of(name, observers.get("weights"), weights)
    if search != MINMAX:
        options["search"] = search
    if pair.activations is not None and not pair.activations.dynamic:
        # Presets name an observer of their own, groups take the default one.
        default = "minmax" if group else "static_minmax"
        observer = observers.get("input") or inputs.get("observer") or default
        options["calibrator"] = calibrator_of(name, observer, inputs)
    assert not importance or isinstance(search, MSE)
    return Grouped(options, weights.get("actorder", _UNSAID), importance)


def _observers(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The observers of weights and inputs that the modifier itself names."""
    said = dict(given.get("observer") or {})
    checked(f"{name}.observer", said, {"weights", "input", "output"})
    for kind, key in (("weights", "weight_observer"), ("input", "input_observer")):
        if given.get(key) is not None:
            said[kind] = given[key]
    if said.pop("output", None) or given.get("output_observer"):
        raise ValueError(f"{name}.output_observer has no counterpart")
    return said


def _listed(value: Any) -> list[str]:
    if value is None:
        return []
    return [value] if isinstance(value, str) else list(value)
