"""Configurations as JSON values, for manifests and results."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any


def describe(value: Any) -> Any:
    """A configuration as JSON values; a dataclass keeps its class's name.

    >>> from qjax.methods import RTN
    >>> describe(RTN("W4A16"))["class"]
    'RTN'
    """
    if is_dataclass(value) and not isinstance(value, type):
        named = {f.name: describe(getattr(value, f.name)) for f in fields(value)}
        return {"class": type(value).__name__, **named}
    if isinstance(value, Mapping):
        return {str(key): describe(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [describe(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return getattr(value, "__name__", str(value))
