"""Which leaves a recipe takes, and how each of them is solved."""

from collections.abc import Sequence
from math import prod
from typing import Any

import jax
import jax.numpy as jnp

from qjax.core.lazy import LazyLeaf
from qjax.core.qtensor import is_quantized
from qjax.recipes import Candidate, assign
from qjax.solving import Job
from qjax.trace.sites import Site, Sites
from qjax.trace.stream import numbered_block


def plan(steps: Sequence[Any], found: Sites, leaves: dict[str, Any]) -> list[Job]:
    """The leaves that the recipe takes, each with the step of every layer.

    Raises:
        ValueError: a step takes nothing, takes part of a stack that must stay whole, or
            keeps outlier features of a site that is no dot.
    """
    every = uses_by_path(found)
    by_path = {
        path: uses for path, uses in every.items() if not is_quantized(leaves[path])
    }
    if every and not by_path:
        raise ValueError("every leaf that a step could take is quantized already")
    candidates = candidates_of(found, by_path)
    assigned = assign(steps, candidates)
    for candidate in candidates:
        for number in set(assigned[candidate.path]):
            if number is not None:
                _check_outliers(steps[number], by_path[candidate.path])
    return [
        _job(candidate.names, by_path[candidate.path], leaves[candidate.path], numbers)
        for candidate in candidates
        for numbers in [assigned[candidate.path]]
        if any(step is not None for step in numbers)
    ]


def uses_by_path(found: Sites) -> dict[str, list[Site]]:
    """The sites of each leaf that are contractions or lookups."""
    by_path: dict[str, list[Site]] = {}
    for site in found.sites:
        if site.layout is not None:
            by_path.setdefault(site.path, []).append(site)
    return by_path


def candidates_of(found: Sites, by_path: dict[str, list[Site]]) -> list[Candidate]:
    """The leaves that a recipe chooses from."""
    return [
        Candidate(
            path,
            _names(uses),
            frozenset(u.kind for u in uses),
            spared=path == found.head or path in found.routers,
        )
        for path, uses in by_path.items()
    ]


def _names(uses: Sequence[Site]) -> tuple[str, ...]:
    """One name per layer of a stacked leaf, also where each layer is its own use."""
    names = {name for use in uses for name in use.names}
    in_order = sorted(
        names,
        key=lambda n: [
            (p.isdigit(), int(p) if p.isdigit() else p) for p in n.split("/")
        ],
    )
    whole = len(names) == prod(uses[0].stacked)
    return tuple(in_order) if whole else (uses[0].path,)


def _job(
    names: tuple[str, ...],
    uses: list[Site],
    leaf: Any,
    assigned: tuple[int | None, ...],
) -> Job:
    main = main_use(uses)
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise ValueError(
            f"{main.path} is {leaf.dtype}; only float leaves are quantized"
        )
    _check_mesh(main.path, leaf)
    if len(set(assigned)) > 1:
        _check_mixed(main, names, assigned)
    read = leaf.read if isinstance(leaf, LazyLeaf) else lambda: leaf
    assert main.layout is not None
    return Job(
        main.path,
        names,
        read,
        main.layout,
        tuple(leaf.shape),
        leaf.dtype,
        assigned,
        _inputs(names, uses, main),
    )


def _inputs(
    names: tuple[str, ...], uses: Sequence[Site], main: Site
) -> tuple[Any, ...]:
    """For each name a key of its first input; the same for sites of one block."""
    keys: dict[str, Any] = {}
    for use in uses:
        if use.kind == main.kind:
            for number, name in enumerate(use.names):
                key = use.kind, use.input, number, numbered_block(name)
                keys.setdefault(name, key)
    return tuple(keys.get(name, name) for name in names)


def main_use(uses: Sequence[Site]) -> Site:
    """The use whose K and N the codes follow: a contraction before a lookup."""
    return next((u for u in uses if u.kind != "embedding"), uses[0])


def _check_outliers(step: Any, uses: Sequence[Site]) -> None:
    activation = getattr(step, "activation", None)
    if getattr(activation, "outliers", None) is None:
        return
    for use in uses:
        if use.kind not in ("dot", "embedding"):
            raise ValueError(
                f"{use.path} is read by a {use.kind}, and only dot sites keep outlier "
                f"features in float; give it another step than {type(step).__name__}, "
                "or leave it out with ignore"
            )


def _check_mesh(path: str, leaf: Any) -> None:
    sharding = getattr(leaf, "sharding", None)
    if not isinstance(sharding, jax.NamedSharding) or sharding.is_fully_replicated:
        return
    if jax.sharding.AxisType.Explicit in sharding.mesh.axis_types:
        raise ValueError(
            f"{path} is sharded over a mesh with explicit axes; make the mesh with "
            "axis_types=(jax.sharding.AxisType.Auto, ...)"
        )


def _check_mixed(
    site: Site, names: tuple[str, ...], assigned: tuple[int | None, ...]
) -> None:
    if len(site.stacked) > 1:
        raise ValueError(
            f"{site.path} is stacked over {len(site.stacked)} axes {site.stacked}; its "
            "layers must all be quantized alike"
        )
    left = [name for name, step in zip(names, assigned) if step is None]
    if left:
        raise ValueError(
            f"{site.path} is one stacked leaf, so that {left[0]} cannot stay in float "
            "while other layers are quantized; give it a step too, such as "
            "RTN('W8A16'), or do not stack the layers"
        )
