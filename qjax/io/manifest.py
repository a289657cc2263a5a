"""The manifest of a saved folder, checked as a whole before anything is made of it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Deeper than any tree of parameters, and far from what Python can recurse.
DEEPEST = 200
FIELDS: Mapping[str, tuple[type, ...]] = {
    "storage": (str,),
    "versions": (dict,),
    "metadata": (dict,),
    "arrays": (dict,),
    "files": (dict,),
    # Any JSON value.
    "recipe": (object,),
    "tree": (object,),
}


def check_depth(path: Path, value: Any) -> None:
    """Refuse JSON values that are nested deeper than any that `save` writes.

    Raises:
      ValueError: naming the file.
    """
    level = [value]
    for _ in range(DEEPEST):
        inner = (x.values() if isinstance(x, dict) else x for x in level)
        level = [x for each in inner for x in each if isinstance(x, (dict, list))]
        if not level:
            return
    raise ValueError(f"{path} is damaged: it is nested more than {DEEPEST} deep")


def check_fields(path: Path, body: Mapping[str, Any]) -> None:
    """Refuse a manifest whose fields are not what `save` writes.

    Raises:
      ValueError: naming the file, the field and its value.
    """
    for name, kinds in FIELDS.items():
        if name not in body:
            raise ValueError(f"{path} is damaged: it has no {name}")
        if not isinstance(body[name], kinds):
            raise ValueError(f"{path} is damaged: {name} is {body[name]!r}")
    for part, whole in (("files", _is_fingerprint), ("arrays", _is_spec)):
        for name, entry in body[part].items():
            if not whole(entry):
                raise ValueError(f"{path} is damaged: {part} has {name!r}: {entry!r}")


def _is_fingerprint(entry: Any) -> bool:
    if not isinstance(entry, dict):
        return False
    return _is_size(entry.get("bytes")) and isinstance(entry.get("sha256"), str)


def _is_spec(entry: Any) -> bool:
    """Whether it is the name of a dtype and a shape."""
    if not isinstance(entry, list) or len(entry) != 2:
        return False
    dtype, shape = entry
    return (
        isinstance(dtype, str) and isinstance(shape, list) and all(map(_is_size, shape))
    )


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
