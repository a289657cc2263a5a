"""Recipes: which step takes which site.

A recipe is one method or a tuple of them. Each step names its sites by patterns:
a glob on the path (`*` also crosses `/`; a pattern that matches `layers/3` takes
everything below it), a regular expression after `re:` (matched from the start of the
path), or a kind of site: `Linear`, `Conv`, `Embedding`.
"""

import difflib
import fnmatch
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qjax.methods.rtn import RTN
from qjax.schemes import SCHEMES, Scheme, scheme
from qjax.trace.control import QuantizationWarning

__all__ = ["SCHEMES", "Candidate", "Scheme", "assign", "scheme", "steps_of"]

KINDS: dict[str, frozenset[str]] = {
    "Linear": frozenset({"dot", "ragged_dot"}),
    "Conv": frozenset({"conv"}),
    "Embedding": frozenset({"embedding"}),
}
GLOB = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class Candidate:
    """A leaf that could be quantized.

    Attributes:
      path: the leaf's path.
      names: what patterns see: the path, or one name per layer of a stacked leaf.
      kinds: the kinds of its sites (`dot`, `conv`, `ragged_dot`, `embedding`).
      spared: the model's output head or a router: left alone unless asked for.
    """

    path: str
    names: tuple[str, ...]
    kinds: frozenset[str]
    spared: bool = False

    @property
    def tied(self) -> bool:
        """Looked up as an embedding: left alone unless asked for."""
        return "embedding" in self.kinds


KINDS_OF_STEPS = ("cache", "allocate", "transform", "quantize", "repair")


def kind_of(step: Any) -> str:
    """What a step does: "cache", "allocate", "transform", "quantize" or "repair".

    A repair that has formats of its own (`quantizes`) quantizes.

    Raises:
        TypeError: it is not a method.
    """
    if getattr(step, "codes_cache", False) and not isinstance(step, type):
        return "cache"
    for kind in ("allocate", "transform", "repair"):
        if hasattr(step, kind) and not isinstance(step, type):
            return "quantize" if getattr(step, "quantizes", False) else kind
    solves = hasattr(step, "solve") or hasattr(step, "solve_site")
    if isinstance(step, type) or not solves:
        raise TypeError(f"a recipe holds methods such as RTN() or HQQ(), got {step!r}")
    return "quantize"


def is_quantizer(step: Any) -> bool:
    """Whether a step codes weights."""
    return kind_of(step) == "quantize"


def needs_data(step: Any) -> bool:
    """Whether a step needs calibration data."""
    if not is_quantizer(step) or hasattr(step, "solve_site"):
        return True
    return step.activation is not None and not step.activation.dynamic


def steps_of(recipe: Any) -> tuple[Any, ...]:
    """The steps of a recipe, in the order in which they run.

    A transform that carries formats of its own (`AWQ(scheme="W4A16_ASYM")`) is short
    for itself and the `RTN` that it names (`expand`).

    Raises:
        TypeError: the recipe is empty or a step is not a method.
    """
    given = tuple(recipe) if isinstance(recipe, (tuple, list)) else (recipe,)
    if not given:
        raise TypeError("the recipe is empty; give a method such as RTN() or HQQ()")
    steps = [each for step in given for each in _expanded(step)]
    return tuple(sorted(steps, key=lambda step: KINDS_OF_STEPS.index(kind_of(step))))


def check_quantizes(steps: Sequence[Any]) -> None:
    """Refuse a recipe that codes no weights, or more than weights.

    Raises:
        ValueError: naming its steps.
    """
    if cache_apart(steps)[1]:
        raise ValueError(
            "the recipe has the step KVCache, which changes the function as well as "
            "the parameters: call f, params = qjax.quantize_cache(f, params, batches) "
            "and leave it out"
        )
    if all(kind_of(step) in ("transform", "repair") for step in steps):
        names = ", ".join(type(step).__name__ for step in steps)
        raise ValueError(
            f"the recipe ({names}) quantizes no weights: add a method that does, such "
            'as RTN("W8A8")'
        )


def cache_apart(recipe: Any) -> tuple[tuple[Any, ...], bool]:
    """The steps without those that code the cache, and whether there was one.

    Raises:
      ValueError: there is no other step.
    """
    steps = tuple(recipe) if isinstance(recipe, (tuple, list)) else (recipe,)
    rest = tuple(step for step in steps if kind_of(step) != "cache")
    if steps and not rest:
        raise ValueError(
            "the recipe is KVCache alone, which codes no weights; add a method such as "
            "RTN()"
        )
    return rest, len(rest) < len(steps)


def allocated(
    steps: Sequence[Any], f: Any, params: Any, calibration: Any, **options: Any
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The steps with each allocate step in the place of what it became; its reports.

    Args:
      steps: as `steps_of` gives them.
      f, params, calibration: of the function, for `step.allocate`.
      options: of `step.allocate`: `example` and `mask_fn`.
    """
    done: list[Any] = []
    reports: list[Any] = []
    for step in steps:
        if kind_of(step) != "allocate":
            done.append(step)
            continue
        became, report = step.allocate(f, params, calibration, **options)
        done += became
        reports.append(report)
    return steps_of(done), tuple(reports)


def _expanded(step: Any) -> tuple[Any, ...]:
    """A transform, and the quantizer whose formats it names."""
    bare: Any = step
    quantizer = getattr(step, "quantizer", None)
    formats = None if quantizer is None or isinstance(step, type) else quantizer()
    if formats is None:
        return (step,)
    following = RTN(
        weights=formats.weights,
        activations=formats.activations,
        targets=step.targets,
        ignore=step.ignore,
    )
    return replace(bare, scheme=None, weights=None), following


def patterns_of(value: str | Iterable[str] | None) -> tuple[str, ...]:
    """One pattern or several, as a tuple."""
    if value is None:
        return ()
    return (value,) if isinstance(value, str) else tuple(value)


def matches(pattern: str, name: str, candidate: Candidate) -> bool:
    """Whether a pattern takes one name of a candidate.

    >>> matches("layers/1", "layers/1/mlp/kernel", Candidate("", (), frozenset()))
    True
    """
    if pattern in KINDS:
        asked = bool(KINDS[pattern] & candidate.kinds)
        return asked and (pattern == "Embedding" or not candidate.tied)
    if pattern.startswith("re:"):
        return re.match(pattern[3:], name) is not None
    if not GLOB.search(pattern):  # as an allocation has by the hundred
        return name == pattern or name.startswith(f"{pattern}/")
    parents = (name[: m.start()] for m in re.finditer("/", name))
    return any(fnmatch.fnmatchcase(n, pattern) for n in (name, *parents))


def assign(
    steps: Sequence[Any], candidates: Sequence[Candidate]
) -> dict[str, tuple[int | None, ...]]:
    """For each leaf's path, the number of the step that takes each of its names.

    The first step that matches takes a name. Without `targets` a step takes every
    linear and convolution but the head, routers and tied leaves.

    Raises:
        ValueError: a pattern of `targets` matches nothing, or all that a step matches
            was taken by the steps before it.
    """
    plan: dict[str, list[int | None]] = {
        c.path: [None] * len(c.names) for c in candidates
    }
    for number, step in enumerate(steps):
        taken = _wanted(step, candidates)
        free = [(path, i) for path, i in taken if plan[path][i] is None]
        if not free:
            raise ValueError(_nothing_left(step, bool(taken), candidates))
        for path, i in free:
            plan[path][i] = number
    return {path: tuple(numbers) for path, numbers in plan.items()}


def _wanted(step: Any, candidates: Sequence[Candidate]) -> list[tuple[str, int]]:
    """The (path, layer) pairs that a step asks for, whoever else has them."""
    targets, ignore = patterns_of(step.targets), patterns_of(step.ignore)
    for pattern in (*targets, *ignore):
        _check(pattern)
    for pattern in targets:
        if not _hits(pattern, candidates):
            raise ValueError(_no_match(step, pattern, candidates))
    for pattern in ignore:
        if not _hits(pattern, candidates):
            text = f"{_class(step)}: ignore pattern {pattern!r} matches nothing"
            warnings.warn(text, QuantizationWarning, stacklevel=5)

    def takes(c: Candidate, name: str) -> bool:
        asked = any(matches(p, name, c) for p in targets) if targets else _default(c)
        return asked and not any(matches(p, name, c) for p in ignore)

    return [
        (c.path, i) for c in candidates for i, n in enumerate(c.names) if takes(c, n)
    ]


def _default(c: Candidate) -> bool:
    return bool(c.kinds - {"embedding"}) and not (c.spared or c.tied)


def _hits(pattern: str, candidates: Sequence[Candidate]) -> bool:
    return any(matches(pattern, name, c) for c in candidates for name in c.names)


def _check(pattern: str) -> None:
    if not pattern.startswith("re:"):
        return
    try:
        re.compile(pattern[3:])
    except re.error as error:
        text = f"pattern {pattern!r} is not a regular expression: {error}"
        raise ValueError(text) from error


def _class(step: Any) -> str:
    return type(step).__name__


def _no_match(step: Any, pattern: str, candidates: Sequence[Candidate]) -> str:
    names = list(dict.fromkeys(n for c in candidates for n in c.names))
    if pattern in KINDS:
        nearest, found = "kinds found", sorted({k for c in candidates for k in c.kinds})
    else:
        plain = pattern.removeprefix("re:").strip("*.^$")
        nearest = "nearest sites"
        found = difflib.get_close_matches(plain, names, n=3, cutoff=0.0)
    listed = ", ".join(found) or "none"
    return f"{_class(step)}: targets {pattern!r} matches no site; {nearest}: {listed}"


def _nothing_left(step: Any, matched: bool, candidates: Sequence[Candidate]) -> str:
    if matched:
        return f"{_class(step)}: every site it matches is taken by an earlier step"
    if not candidates:
        return f"{_class(step)}: the function has no site whose weight is a parameter"
    if not (step.targets or step.ignore):
        return (
            f"{_class(step)}: no site is taken by default, since all are the head or "
            f"tied embeddings ({', '.join(c.path for c in candidates)}); name them in "
            "targets"
        )
    return f"{_class(step)}: ignore {step.ignore!r} leaves it no site"


def wanted_names(step: Any, jobs: Sequence[Any]) -> list[str]:
    """The names, among those that are quantized, that a transform or repair takes.

    Raises:
        ValueError: a pattern of `targets` matches nothing.
    """
    candidates = [
        Candidate(job.path, job.names, frozenset({"dot", "conv"})) for job in jobs
    ]
    by_path = {job.path: job.names for job in jobs}
    return [by_path[path][i] for path, i in _wanted(step, candidates)]
