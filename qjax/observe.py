"""`observe`: statistics of the input of every site, without quantizing anything."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from qjax.core.statistics import Statistic
from qjax.leaves import Leaves
from qjax.recipes import Candidate, matches, patterns_of
from qjax.trace.batches import as_batches
from qjax.trace.marks import Marks
from qjax.trace.program import Program, is_arraylike, trace
from qjax.trace.rows import Accumulator, Seen, finalized, merged, refusal
from qjax.trace.sites import Sites, sites
from qjax.trace.stream import LeafKey, Point, Stream, find_points, lanes_of


def observe(
    f: Callable[..., Any],
    params: Any,
    calibration: Iterable[Any],
    statistics: Statistic | Mapping[str, Statistic],
    *,
    targets: str | tuple[str, ...] | None = None,
    mask_fn: Callable[..., Any] | None = None,
) -> dict[str, Any]:
    """Statistics of the activation `x[M, K]` at every site, over all batches.

    Args:
      f: `f(params, *inputs)`.
      params: float, lazy or quantized leaves.
      calibration: batches, each a tuple of `f`'s inputs.
      statistics: one, such as `Hessian()`, or several by name.
      targets: patterns of the sites to observe, as in recipes; None takes all.
      mask_fn: `mask_fn(*inputs)` gives a weight for each token; padding has weight 0.

    Returns:
      By site name (`layers/3/attn/q_proj/kernel`), the finalized statistic, or a dict
      of them; experts' axes are in front. A leaf that is read several times has one
      name: its statistics are over all of its uses, of those that read its axes as the
      first does. Sites inside `shard_map`, lookups and grouped convolutions are absent,
      and so are branches that no batch takes.

    Raises:
      ValueError: no batch, no site, a pattern that matches none, or an activation that
        is not finite.
      TypeError: a batch is no tuple.
    """
    batches = as_batches(calibration)
    if not batches:
        raise ValueError("observe needs at least one batch of calibration data")
    several = isinstance(statistics, Mapping)
    asked = dict(statistics) if isinstance(statistics, Mapping) else {"": statistics}
    found = sites(f, params, *batches[0])
    chosen = _chosen(found, patterns_of(targets))

    def traced(batch: Any) -> Program:
        return trace(f, params, batch)

    lanes = lanes_of(traced, batches)
    name = namer(found, lanes[0].program)
    points = find_points(lanes, lambda key: name(key) in chosen, name, repeated=True)
    leaves = Leaves(lanes[0].program.leaves)
    stream = Stream(lanes, points, leaves.read)
    masks = [None if mask_fn is None else mask_fn(*batch) for batch in batches]
    marks = Marks(stream, masks)
    arrays = [[x for x in jax.tree.leaves(b) if is_arraylike(x)] for b in batches]
    stream.start(arrays, marks.kept)
    states: dict[str, Seen] = {}
    layouts: dict[str, Any] = {}
    for point in stream:
        seen = _seen(asked, marks, point)
        if seen is None:
            continue
        for each, op in zip(point.names, point.meetings):
            if layouts.setdefault(each, op.call.layout) == op.call.layout:
                before = states.get(each)
                states[each] = seen if before is None else merged(asked, before, seen)
    values = {each: finalized(asked, seen) for each, seen in states.items()}
    return values if several else {each: value[""] for each, value in values.items()}


def _seen(asked: Mapping[str, Statistic], marks: Marks, point: Point) -> Seen | None:
    """What the sites of a point see; None if nothing can be seen, or nothing came."""
    if refusal(point.meetings[0]):
        return None
    accumulator = Accumulator()
    seen = accumulator.init(asked, point.meetings[0])
    for number, op, x, full, rest in marks.stream.inputs(point):
        mask, fits = marks.take(number, op, x, rest)
        if not fits:
            shape = marks.masks[number].shape
            raise ValueError(
                f"the mask of batch {number} has shape {shape}, which does not "
                f"fit the {op.call.M} tokens that {point.names[0]} sees"
            )
        seen = accumulator.update(asked, op, seen, x, full, rest, mask)
    bad = int(np.sum(np.asarray(seen.bad)))
    if bad:
        raise ValueError(
            f"the input of {point.names[0]} holds {bad} NaN or Inf in calibration"
        )
    return seen if np.asarray(seen.tokens).any() else None


def namer(found: Sites, program: Program) -> Callable[[LeafKey], str]:
    """The name of a layer of a leaf, as patterns see it.

    Layer numbers stand where the names of sites have them, also in the names of leaves
    that are no site (gains, biases).
    """
    named = [
        (site.path, _inserted(name, site.path), name)
        for site in found.weights
        for name in site.names
    ]
    names = {(path, tuple(places.values())): name for path, places, name in named}
    stacked = {path: tuple(places) for path, places, _ in named if places}

    def name(key: LeafKey) -> str:
        path, index = program.paths[key[0]], key[1]
        return names.get((path, index)) or _numbered(path, index, stacked)

    return name


def _inserted(name: str, path: str) -> dict[int, int]:
    """The layer numbers that a name has and its leaf's path has not, by place.

    >>> _inserted("layers/3/attn/kernel", "layers/attn/kernel")
    {1: 3}
    """
    rest = path.split("/")
    return {
        place: int(part)
        for place, part in enumerate(name.split("/"))
        if not (rest and part == rest[0] and rest.pop(0))
    }


def _numbered(
    path: str, index: tuple[int, ...], stacked: Mapping[str, tuple[int, ...]]
) -> str:
    """A path with layer numbers, where its nearest relative has them; else behind.

    >>> _numbered("layers/norm/scale", (3,), {"layers/attn/kernel": (1,)})
    'layers/3/norm/scale'
    """
    parts = path.split("/")

    def shared(other: str) -> int:
        pairs = zip(parts, other.split("/"))
        return next((i for i, (a, b) in enumerate(pairs) if a != b), len(parts))

    alike = [o for o, places in stacked.items() if len(places) == len(index)]
    nearest = max(alike, key=shared, default="")
    places = stacked.get(nearest, ())
    if not places or shared(nearest) <= places[-1] - len(places):
        places = range(len(parts), len(parts) + len(index))
    for place, number in zip(places, index):
        parts.insert(place, str(number))
    return "/".join(parts)


def _chosen(found: Sites, patterns: tuple[str, ...]) -> set[str]:
    """The names of the sites that the patterns take."""
    pairs = [
        (Candidate(site.path, site.names, frozenset({site.kind})), name)
        for site in found.weights
        for name in site.names
    ]
    for pattern in patterns:
        if not any(matches(pattern, name, c) for c, name in pairs):
            raise ValueError(f"observe: targets {pattern!r} matches no site")
    if not pairs:
        raise ValueError(
            "observe: the function has no site whose weight is a parameter"
        )
    return {
        name
        for c, name in pairs
        if not patterns or any(matches(p, name, c) for p in patterns)
    }
