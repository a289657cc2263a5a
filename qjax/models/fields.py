"""The fields of a Hugging Face `config.json`, checked when read."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

_REQUIRED: Any = object()
_LARGEST = float(np.finfo(np.float32).max)


@dataclasses.dataclass(frozen=True)
class Fields:
    """A configuration whose fields are read by type.

    Every method raises a ValueError that names the field, its value and what would be
    valid. A field that is absent or null takes the default, which may be None; without
    one it is required.
    """

    raw: Mapping[str, Any]

    def integer(self, name: str, default: Any = _REQUIRED) -> Any:
        """A positive integer."""
        return self._checked(
            name,
            default,
            "a positive integer",
            lambda x: isinstance(x, int) and not isinstance(x, bool) and x > 0,
        )

    def number(self, name: str, default: Any = _REQUIRED) -> Any:
        """A positive number that float32 holds."""
        return self._checked(name, default, "a positive number", _is_positive)

    def numbers(self, name: str, count: int) -> tuple[float, ...]:
        """A list of so many positive numbers."""
        found = self._checked(
            name,
            _REQUIRED,
            f"a list of {count} positive numbers",
            lambda x: isinstance(x, (list, tuple)) and len(x) == count,
        )
        return tuple(float(Fields({name: x}).number(name)) for x in found)

    def flag(self, name: str, default: Any = _REQUIRED) -> Any:
        """True or false."""
        return self._checked(
            name, default, "true or false", lambda x: isinstance(x, bool)
        )

    def choice(
        self, name: str, choices: Sequence[str], default: Any = _REQUIRED
    ) -> Any:
        """One of some words."""
        valid = "one of " + ", ".join(choices)
        return self._checked(name, default, valid, lambda x: x in choices)

    def require(self, name: str, value: Any) -> None:
        """A switch that must be as given, if present: nothing else is implemented."""
        found = self.raw.get(name)
        if found is not None and found != value:
            raise ValueError(
                f"config.json: {name} is {found!r}, but only {value!r} is supported"
            )

    def filled(self, **values: Any) -> "Fields":
        """The same with values for what is absent or null."""
        given = {name: x for name, x in self.raw.items() if x is not None}
        return Fields({**values, **given})

    def table(self, name: str) -> "Fields | None":
        """A nested object, or None."""
        found = self.raw.get(name)
        if found is None:
            return None
        if not isinstance(found, Mapping):
            raise ValueError(f"config.json: {name} is {found!r}, expected an object")
        return Fields(found)

    def _checked(self, name: str, default: Any, valid: str, test: Any) -> Any:
        found = self.raw.get(name)
        if found is None and default is not _REQUIRED:
            return default
        if found is None:
            raise ValueError(f"config.json: {name} is missing, expected {valid}")
        if not test(found):
            raise ValueError(f"config.json: {name} is {found!r}, expected {valid}")
        return found


def _is_positive(x: Any) -> bool:
    number = isinstance(x, (int, float)) and not isinstance(x, bool)
    return number and 0 < x <= _LARGEST


def head_sizes(fields: Fields) -> tuple[int, int, int]:
    """Query heads, key-value heads and features of a head, which must fit together."""
    heads = fields.integer("num_attention_heads")
    kv_heads = fields.integer("num_key_value_heads", heads)
    if heads % kv_heads:
        raise ValueError(
            f"config.json: num_key_value_heads is {kv_heads}, "
            f"expected a divisor of num_attention_heads, {heads}"
        )
    return (
        heads,
        kv_heads,
        fields.integer("head_dim", None)
        or split_heads(
            "hidden_size", fields.integer("hidden_size"), "num_attention_heads", heads
        ),
    )


def split_heads(name: str, features: int, heads_name: str, heads: int) -> int:
    """Features of a head, where heads share the model's features evenly."""
    if features % heads:
        raise ValueError(
            f"config.json: {name} is {features}, expected a multiple of {heads_name}, "
            f"{heads}"
        )
    return features // heads


def layer_windows(fields: Fields, layers: int) -> tuple[int | None, ...]:
    """The sliding window of every layer of Qwen2 and Qwen3."""
    window = fields.integer("sliding_window", None)
    if window is None or not fields.flag("use_sliding_window", False):
        return (None,) * layers
    first = fields.raw.get("max_window_layers", 28)
    sliding = attention_kinds(fields, tuple(i >= first for i in range(layers)))
    return tuple(window if each else None for each in sliding)


def attention_kinds(fields: Fields, default: tuple[bool, ...]) -> tuple[bool, ...]:
    """For every layer, whether its attention has a sliding window."""
    kinds, layers = fields.raw.get("layer_types"), len(default)
    if kinds is None:
        return default
    known = ("sliding_attention", "full_attention")
    listed = isinstance(kinds, (list, tuple)) and len(kinds) == layers
    if not listed or any(kind not in known for kind in kinds):
        raise ValueError(
            f"config.json: layer_types is {kinds!r}, expected {layers} entries out of "
            + ", ".join(known)
        )
    return tuple(kind == known[0] for kind in kinds)
