"""Paths of parameter leaves: `layers/3/attn/q_proj/kernel`."""

from collections.abc import Sequence
from typing import Any

import jax

from qjax.core.qtensor import is_quantized


def path_of(keys: Sequence[Any]) -> str:
    """A key path as text, components joined by `/`.

    >>> path_of(jax.tree_util.tree_flatten_with_path({"a": [1]})[0][0][0])
    'a/0'
    """
    return "/".join(_component(key) for key in keys)


def _component(key: Any) -> str:
    for field in ("key", "name", "idx"):
        if hasattr(key, field):
            return str(getattr(key, field))
    return str(key)


def flatten_with_paths(params: Any) -> list[tuple[str, Any]]:
    """Leaves with their paths; a quantized leaf is one leaf."""
    flat, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_quantized)
    return [(path_of(keys), leaf) for keys, leaf in flat]


def layer_names(
    path: str, stacked: Sequence[int], groups: Sequence[Sequence[str]]
) -> tuple[str, ...]:
    """What patterns see of a scanned leaf: one name per layer.

    The index goes behind the longest path that all leaves scanned together share, so
    that scanned and unrolled models have the same names.

    >>> layer_names("layers/q/w", [2], [["layers/q/w", "layers/k/w"]])
    ('layers/0/q/w', 'layers/1/q/w')
    """
    names: list[tuple[str, str]] = [("", path)]
    for length, group in zip(stacked, groups):
        # A leaf scanned alone shares its whole path with itself.
        inside = max(1, path.count("/"))
        depth = min(_shared_depth([*group, path]), inside)
        names = [
            (f"{head}{front}{i}/", back)
            for head, tail in names
            for front, back in [_cut(tail, depth - head.count("/") + len_index(head))]
            for i in range(length)
        ]
    return tuple((head + tail).rstrip("/") for head, tail in names)


def len_index(head: str) -> int:
    """How many components of a name's head are layer numbers."""
    return sum(part.isdigit() for part in head.split("/"))


def _cut(path: str, depth: int) -> tuple[str, str]:
    parts = path.split("/")
    front, back = parts[:depth], parts[depth:]
    return "".join(f"{p}/" for p in front), "/".join(back)


def _shared_depth(paths: Sequence[str]) -> int:
    split = [p.split("/") for p in paths]
    shared = 0
    for column in zip(*split):
        if len(set(column)) > 1:
            break
        shared += 1
    return shared
