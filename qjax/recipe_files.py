"""Recipes as text: our own form in YAML, and llm-compressor's.

A recipe is a list of steps, each a method with the fields that differ from its
defaults. A format, search or calibrator is written the same way, or by its name alone
where it needs no fields; granularities are `tensor`, `channel`, `token`, `{group: 128}`
and `{block: [128, 128]}`:

    - AWQ: {n_grid: 20}
    - GPTQ:
        weights: {Int: {bits: 4, granularity: {group: 128}}}
        search: MSE
        ignore: [layers/0]
    - RTN: {scheme: W8A16, targets: layers/0}
    - KVCache
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from qjax.allocate import MixedPrecision
from qjax.core import formats, ranges
from qjax.core.formats import Granularity, block, channel, group, tensor, token
from qjax.core.qtensor import Activation
from qjax.core.scales import MSE, AbsMax, MinMax, Percentile
from qjax.methods import METHODS
from qjax.models.coded_cache import KVCache
from qjax.recipe_llmcompressor import is_stages, steps_of_stages
from qjax.recipes import kind_of

STEPS: dict[str, type] = {
    each.__name__: each for each in (*METHODS, MixedPrecision, KVCache)
}
PARTS: dict[str, type] = {
    each.__name__: each
    for each in (
        *(formats.Int, formats.Float, formats.MX, formats.NVFP4),
        *(
            formats.Codebook,
            formats.Additive,
            formats.Binary,
            formats.Ternary,
            Activation,
        ),
        *(MinMax, AbsMax, Percentile, MSE),
        *(ranges.MinMaxRange, ranges.MovingAverageRange, ranges.PercentileRange),
        *(ranges.MSERange, ranges.KLRange),
    )
}
# How a granularity is written, and how many numbers it takes.
GRANULARITIES: dict[str, tuple[Any, int]] = {
    "tensor": (tensor, 0),
    "channel": (channel, 0),
    "token": (token, 0),
    "group": (group, 1),
    "block": (block, 2),
}
# Fields in which a bare name stands for an object.
OBJECTS = frozenset(
    {
        "weights",
        "activations",
        "factors",
        "format",
        "granularity",
        "search",
        "calibrator",
        "then",
    }
)


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice, of which YAML would keep the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = next((key for i, key in enumerate(keys) if key in keys[:i]), None)
        if twice is not None:
            raise ValueError(
                f"the recipe has the key {twice!r} twice in one mapping, at line "
                f"{node.start_mark.line + 1}; write steps as a list"
            )
        return super().construct_mapping(node, deep)


def read_recipe(
    source: str | os.PathLike[str], model: str | os.PathLike[str] | None = None
) -> tuple[Any, ...]:
    """The steps of a recipe in YAML (or JSON, which is YAML).

    Args:
      source: a file; or the text itself, told by a line end, a bracket or a colon.
      model: for llm-compressor's recipes, the Hugging Face folder or id of the model
        whose modules they name; without it they may only say `Linear` and `lm_head`.

    Raises:
      FileNotFoundError: the file or the model is missing.
      ValueError: not YAML, an unknown method, part or field (the message lists the
        known ones), or a value that the method refuses.
      TypeError: a step is not a method.
    """
    data = _parsed(_text(source))
    if is_stages(data):
        return steps_of_stages(data, model)
    if isinstance(data, Mapping):
        data = [data]
    if not isinstance(data, list) or not data:
        raise ValueError(
            "a recipe is a list of steps such as [{RTN: {scheme: W4A16}}], or "
            f"llm-compressor's stages; got {data!r}"
        )
    steps = tuple(_step(each) for each in data)
    for step in steps:
        kind_of(step)
    return steps


def _text(source: str | os.PathLike[str]) -> str:
    if isinstance(source, str):
        written = any(mark in source for mark in ("\n", "{", "[", ": "))
        if written or source.startswith("- "):
            return source
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"recipe file {str(path)!r} does not exist")
    return path.read_text(encoding="utf-8")


def _parsed(text: str) -> Any:
    try:
        # A subclass of the safe loader: it makes plain values only.
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"the recipe is not YAML: {reason}") from error


def _step(value: Any) -> Any:
    if isinstance(value, str):
        value = {value: None}
    return _object(value, "the recipe", STEPS)


def _object(value: Mapping[Any, Any], where: str, known: Mapping[str, Any]) -> Any:
    """An object from `{Name: arguments}`."""
    if not isinstance(value, Mapping) or len(value) != 1:
        raise ValueError(
            f"{where}: expected one {{Name: {{field: value}}}}, got {value!r}"
        )
    ((name, given),) = value.items()
    if name not in known:
        raise ValueError(
            f"{where}: {name!r} is unknown; known are {', '.join(map(str, known))}"
        )
    if name in GRANULARITIES:
        return _granularity(name, given, where)
    return _made(known[name], {} if given is None else given)


def _made(kind: type, given: Any) -> Any:
    names = [each.name for each in fields(kind)]
    if not isinstance(given, Mapping):
        raise ValueError(
            f"{kind.__name__}: expected {{field: value}}, got {given!r}; fields are "
            f"{', '.join(names) or 'none'}"
        )
    for name in given:
        if name not in names:
            raise ValueError(
                f"{kind.__name__}: {name!r} is unknown; fields are "
                f"{', '.join(names) or 'none'}"
            )
    missing = [n for n in _required(kind) if n not in given]
    if missing:
        raise ValueError(f"{kind.__name__}: {missing[0]!r} is missing")
    return kind(**{n: _value(v, f"{kind.__name__}.{n}", n) for n, v in given.items()})


def _required(kind: type) -> list[str]:
    return [each.name for each in fields(kind) if each.default is MISSING]


def _value(value: Any, where: str, field: str) -> Any:
    parts = {**PARTS, **STEPS, **GRANULARITIES}
    if isinstance(value, str) and field in OBJECTS:
        value = {value: None}
    if isinstance(value, Mapping):
        return _object(value, where, parts)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(_value(each, where, field) for each in value)
    return value


def _granularity(name: str, given: Any, where: str) -> Granularity:
    make, count = GRANULARITIES[name]
    numbers = [] if given in (None, {}, []) else given
    numbers = numbers if isinstance(numbers, list) else [numbers]
    if len(numbers) != count:
        raise ValueError(
            f"{where}: {name} takes {count} numbers, got {given!r}; write tensor, "
            "channel, token, {group: 128} or {block: [128, 128]}"
        )
    return make(*numbers)


def write_recipe(steps: Any) -> str:
    """The steps in our own form; `read_recipe` gives them back.

    Raises:
      TypeError: a step or a value is none of qjax's own.
    """
    given = steps if isinstance(steps, (tuple, list)) else (steps,)
    for step in given:
        if type(step).__name__ not in STEPS:
            raise TypeError(
                f"a recipe file holds qjax's own methods, got {step!r}; known are "
                f"{', '.join(STEPS)}"
            )
    plain = [_plain(step, "") for step in given]
    return yaml.safe_dump(plain, sort_keys=False, width=88)


def _plain(value: Any, field: str) -> Any:
    if isinstance(value, Granularity):
        return _plain_granularity(value)
    if is_dataclass(value) and not isinstance(value, type):
        name = type(value).__name__
        if name not in {**PARTS, **STEPS}:
            raise TypeError(f"{field} holds {value!r}, which a recipe file cannot")
        told = {n: _plain(v, n) for n, v in _telling(value).items()}
        return name if not told and field in OBJECTS else {name: told}
    if isinstance(value, (tuple, list)):
        return [_plain(each, field) for each in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{field} holds {value!r}, which a recipe file cannot")


def _telling(value: Any) -> dict[str, Any]:
    """The fields without which it would be another object."""
    kind = type(value)
    told = {each.name: getattr(value, each.name) for each in fields(value)}
    for name in reversed(list(told)):
        rest = {n: v for n, v in told.items() if n != name}
        if name in _required(kind):
            continue
        try:
            same = kind(**rest) == value
        except (TypeError, ValueError):
            same = False
        told = rest if same else told
    return told


def _plain_granularity(value: Granularity) -> Any:
    rows, cols = value.rows, value.cols
    if rows is None and cols in (None, 1):
        return "tensor" if cols is None else "channel"
    return {"group": rows} if cols == 1 else {"block": [rows, cols]}
