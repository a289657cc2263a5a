"""Patterns on the names of Hugging Face modules, as patterns on leaves.

`Linear` is torch's class, `re:...` a regular expression matched from the start of the
name, anything else the name itself (`model.layers.0.mlp.up_proj`, `lm_head`).
"""

import os
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from glob import escape
from itertools import product
from typing import Any

from qjax.io.huggingface import find_folder, read_config
from qjax.trace.control import QuantizationWarning

HEAD = "lm_head"
KINDS = ("Linear", "Embedding")


@dataclass(frozen=True)
class Module:
    """A module of the torch model: its name, its class and the leaf it becomes."""

    name: str
    kind: str
    path: str

    @property
    def router(self) -> bool:
        """Whether it chooses experts."""
        return self.path.endswith("/router/kernel")

    def answers(self, pattern: str) -> bool:
        """Whether a pattern means this module."""
        if pattern in KINDS:
            return pattern == self.kind and not self.router
        return names(pattern, self.name)


def names(pattern: str, name: str) -> bool:
    """Whether a pattern on names matches a module's."""
    if not pattern.startswith("re:"):
        return pattern == name
    try:
        return re.match(pattern[3:], name) is not None
    except re.error as error:
        text = f"pattern {pattern!r} is not a regular expression: {error}"
        raise ValueError(text) from error


@dataclass(frozen=True)
class Modules:
    """The linears and embeddings of a model."""

    every: tuple[Module, ...]

    @classmethod
    def of(cls, model: str | os.PathLike[str]) -> "Modules":
        """Those of a Hugging Face folder or id; reads the configuration alone."""
        module, config = read_config(find_folder(os.fspath(model)))
        found = []
        for row in module.names(config):
            kind = {"kernel": "Linear", "embedding": "Embedding"}.get(
                row.path.rsplit("/", 1)[-1]
            )
            if kind is None:
                continue
            layers = range(config.layers) if "{layer}" in row.path else range(1)
            experts = range(config.experts) if "{expert}" in row.hf else range(1)
            for layer, expert in product(layers, experts):
                name = row.hf.removesuffix(".weight").format(layer=layer, expert=expert)
                found.append(Module(name, kind, row.path.format(layer=layer)))
        return cls(tuple(found))

    @property
    def default(self) -> tuple[str, ...]:
        """The leaves that a step without targets takes."""
        linears = (m for m in self.every if m.kind == "Linear")
        kept = (m for m in linears if not m.router and m.name != HEAD)
        return tuple(dict.fromkeys(m.path for m in kept))

    def matching(self, owner: str, patterns: Iterable[str]) -> set[Module]:
        """The modules that a pattern means.

        Raises:
          ValueError: a pattern takes some experts of a leaf and leaves others.
        """
        found = {m for m in self.every if any(m.answers(p) for p in patterns)}
        for path in {m.path for m in found}:
            left = [m for m in self.every if m.path == path and m not in found]
            if left:
                raise ValueError(
                    f"{owner}: {left[0].name} is left where other experts of its layer "
                    "are taken; they are one leaf here"
                )
        return found


def resolved(
    owner: str, targets: Sequence[str], ignore: Sequence[str], modules: Modules | None
) -> dict[str, Any]:
    """`targets` and `ignore` of the step.

    Raises:
      ValueError: a pattern that needs the model's names, or targets that match nothing.
    """
    if modules is None:
        _check_plain(owner, targets, ignore)
        return {} if ignore else {"targets": "Linear"}
    _check_matches(owner, targets, ignore, modules)
    kept = modules.matching(owner, targets) - modules.matching(owner, ignore)
    taken = {m.path for m in kept}
    modules.matching(owner, [m.name for m in kept])
    default = modules.default
    if taken == set(default):
        return {}
    left = [path for path in default if path not in taken]
    if taken < set(default) and len(left) < len(taken):
        return {"ignore": tuple(map(escape, left))}
    order = dict.fromkeys(m.path for m in modules.every)
    return {"targets": tuple(escape(path) for path in order if path in taken)}


def ignored(
    owner: str, ignore: Sequence[str], modules: Modules | None
) -> tuple[str, ...]:
    """`ignore` of a transform, which takes whatever is quantized."""
    if modules is None:
        _check_plain(owner, ["Linear"], ignore)
        return ()
    found = {m.path for m in modules.matching(owner, ignore)}
    return tuple(escape(path) for path in modules.default if path in found)


def _check_plain(owner: str, targets: Sequence[str], ignore: Sequence[str]) -> None:
    """Refuse what only the model's own names could tell."""
    heads = [p for p in ignore if HEAD in p and names(p, HEAD)]
    other = [p for p in targets if p != "Linear"]
    other += [p for p in ignore if p not in heads]
    if other:
        raise ValueError(
            f"{owner}: {other[0]!r} names modules of a Hugging Face model; say of "
            "which, read_recipe(..., model=folder_or_id)"
        )


def _check_matches(
    owner: str, targets: Sequence[str], ignore: Sequence[str], modules: Modules
) -> None:
    for pattern in targets:
        if not any(m.answers(pattern) for m in modules.every):
            raise ValueError(f"{owner}: targets {pattern!r} matches no module")
    for pattern in ignore:
        # A tied model has no head of its own, and is left alone by default.
        if names(pattern, HEAD) or any(m.answers(pattern) for m in modules.every):
            continue
        warnings.warn(
            f"{owner}: ignore {pattern!r} matches no module",
            QuantizationWarning,
            stacklevel=2,
        )
