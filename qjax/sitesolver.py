"""The sites of one point, solved in one compiled program.

Sites that share an input share its statistics, and whatever their method makes of them;
where the columns of `w[K, N]` are independent, the sites are solved side by side, with
one second scale in formats that have one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from qjax.core.histogram import Histogram
from qjax.core.ranges import calibrator_of
from qjax.core.statistics import (
    Hessian,
    MovingRange,
    Range,
    SecondMoment,
    Statistic,
)
from qjax.methods.base import Solution, solution_of
from qjax.placement import NOWHERE, Placement
from qjax.solving import Solved, site_key, solved_as_one, weight_error
from qjax.trace.rows import Seen, finalized

# Reported errors are those of at most about so many outputs, evenly spaced: all of them
# would cost as much as the solver.
MEASURED_OUTPUTS = 256


@dataclass(frozen=True)
class Problem:
    """A site to solve: its name, weights `w[*experts, K, N]`, method and repairs.

    Repairs that must know what they repair (`bind`) are told once.
    """

    name: str
    w: Any
    method: Any
    repairs: tuple[Any, ...]
    dtype: Any

    def __post_init__(self):
        if self.w is None:
            return
        lead = self.w.shape[:-2]
        bound = tuple(
            repair.bind(self.method, lead) if hasattr(repair, "bind") else repair
            for repair in self.repairs
        )
        object.__setattr__(self, "repairs", bound)


@dataclass(frozen=True)
class Result:
    """A solved site.

    Attributes:
      solved: what was found, with the experts' axes in front.
      numbers: numpy arrays for the report, one value for each expert: squared errors
        of the output `error_before` (rounded to nearest) and `error` (as solved), its
        squared `norm`, `weight_error` and `weight_norm`, `bad_weights`, `tokens`, and
        the method's `notes`.
      measured: what the errors come from, see `SiteReport`.
    """

    solved: Solved
    numbers: Mapping[str, Any]
    measured: str


def statistics_of(problems: Sequence[Problem]) -> dict[str, Statistic]:
    """Everything that the problems need to know of their input, each thing once."""
    needed: dict[Any, None] = {}
    for problem in problems:
        for step in (problem.method, *problem.repairs):
            needed |= dict.fromkeys(getattr(step, "statistics", {}).values())
        calibrator = calibrator_of(problem.method)
        if calibrator is not None:
            needed[calibrator.statistic(problem.method.activation.format)] = None
    if Hessian() not in needed:
        needed[SecondMoment()] = None
    return {repr(statistic): statistic for statistic in needed}


def solve_sites(
    problems: Sequence[Problem],
    statistics: Mapping[str, Statistic],
    seen: Seen,
    key: Any,
    placement: Placement = NOWHERE,
) -> list[Result]:
    """The problems, solved; those of one method in one program.

    Args:
      problems: sites that read one activation.
      statistics: what was accumulated, by name.
      seen: the accumulated states.
      key: for methods that draw random numbers.
      placement: the mesh.
    """
    results: dict[int, Result] = {}
    groups: dict[Any, list[int]] = {}
    for i, problem in enumerate(problems):
        groups.setdefault((problem.method, problem.repairs), []).append(i)
    for (method, repairs), members in groups.items():
        names = _names(statistics, method, repairs)
        keys = [
            site_key(key, problems[i].name) if method.random else None for i in members
        ]
        ws = tuple(problems[i].w for i in members)
        measured = _measured(statistics, names)
        asked = tuple((n, statistics[n]) for n in names)
        mine = Seen({n: seen.states[n] for n in names}, seen.tokens, seen.bad)
        solved, numbers = _solve(
            method, repairs, asked, measured, placement, ws, mine, keys
        )
        numbers = jax.device_get(numbers)
        for i, each, known in zip(members, solved, numbers):
            blind = not known["tokens"].any()
            results[i] = Result(each, known, "weights" if blind else measured)
    return [results[i] for i in range(len(problems))]


def _names(statistics: Mapping[str, Statistic], method: Any, repairs: Any) -> list[str]:
    """The statistics that a method, its repairs and its report read."""
    alone = statistics_of([Problem("", None, method, repairs, None)])
    extra = [repr(Hessian())] if repr(Hessian()) in statistics else []
    return list(dict.fromkeys([*(n for n in alone if n in statistics), *extra]))


def _measured(statistics: Mapping[str, Statistic], names: Sequence[str]) -> str:
    kinds = {type(statistics[name]) for name in names}
    if Hessian in kinds:
        return "output"
    return "diagonal" if SecondMoment in kinds else "weights"


def _known(statistic: Statistic, value: Any, tokens: Any) -> Any:
    """A statistic, or that of white noise for experts that saw nothing."""
    if isinstance(statistic, Hessian):
        neutral = jnp.eye(value.shape[-1], dtype=value.dtype)
    elif isinstance(statistic, SecondMoment):
        neutral = jnp.ones((), value.dtype)
    else:
        return value
    extra = value.ndim - tokens.ndim
    nothing = jnp.reshape(tokens, (*tokens.shape, *(1,) * extra)) == 0
    return jnp.where(nothing, neutral, value)


def lent(statistics: Mapping[str, Statistic], seen: Seen) -> Seen:
    """Experts that saw nothing take the ranges of all experts together.

    Their own are unknown, and what is coded on an empty range is lost.
    """
    if not seen.tokens.ndim:
        return seen
    states = {
        name: _filled(statistics[name], state, seen.tokens)
        if isinstance(statistics[name], (Range, MovingRange, Histogram))
        else state
        for name, state in seen.states.items()
    }
    return replace(seen, states=states)


def _filled(statistic: Statistic, states: Any, tokens: Any) -> Any:
    """`states[*lead]` with the merged state of all where there are no `tokens`."""
    lead = tokens.ndim
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[lead:]), states)
    first, others = (
        jax.tree.map(lambda x, s=s: x[s], flat) for s in (0, slice(1, None))
    )
    whole = jax.lax.scan(lambda a, b: (statistic.merge(a, b), None), first, others)[0]

    def filled(own: Any, every: Any) -> Any:
        nothing = tokens.reshape(*tokens.shape, *(1,) * every.ndim) == 0
        return jnp.where(nothing, every, own)

    return jax.tree.map(filled, states, whole)


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _solve(
    method: Any,
    repairs: tuple[Any, ...],
    asked: tuple[tuple[str, Statistic], ...],
    measured: str,
    placement: Placement,
    ws: tuple[Any, ...],
    seen: Seen,
    keys: Sequence[Any],
) -> tuple[list[Solved], list[dict[str, Any]]]:
    statistics = dict(asked)
    ws = tuple(placement.matrices(ws))
    found = {
        name: _known(statistics[name], value, seen.tokens)
        for name, value in finalized(statistics, lent(statistics, seen)).items()
    }
    lead = ws[0].shape[:-2]
    one = partial(_solve_matrices, method, repairs, measured)
    if not lead:
        pairs = one(ws, found, keys)
    else:
        flat_ws, flat_found = jax.tree.map(
            lambda x: x.reshape(-1, *x.shape[len(lead) :]), (ws, found)
        )
        count = flat_ws[0].shape[0]
        spread = [None if k is None else jax.random.split(k, count) for k in keys]
        pairs = jax.lax.map(lambda a: one(*a), (flat_ws, flat_found, spread))
        pairs = jax.tree.map(lambda x: x.reshape(*lead, *x.shape[1:]), pairs)
    numbers = placement.everywhere([{**n, "tokens": seen.tokens} for _, n in pairs])
    return placement.everywhere([each for each, _ in pairs]), numbers


def _solve_matrices(
    method: Any,
    repairs: tuple[Any, ...],
    measured: str,
    ws: tuple[Any, ...],
    found: Mapping[str, Any],
    keys: Sequence[Any],
) -> list[tuple[Solved, dict[str, Any]]]:
    stats = named(method, found)
    if len(ws) > 1 and solved_as_one(method):
        whole = _one(method, jnp.concatenate(ws, axis=-1), stats, keys[0])
        solutions = whole.split([w.shape[-1] for w in ws])
    else:
        solutions = [_one(method, w, stats, k) for w, k in zip(ws, keys)]
    return [
        _finished(method, repairs, measured, w, s, found) for w, s in zip(ws, solutions)
    ]


def _one(method: Any, w: Any, stats: Mapping[str, Any], key: Any) -> Solution:
    if hasattr(method, "solve_site"):
        return method.solve_site(w, stats, key)
    return solution_of(method.solve(w, key))


def named(step: Any, found: Mapping[str, Any]) -> dict[str, Any]:
    """The statistics under the names that a step gives them."""
    asked = getattr(step, "statistics", {})
    return {name: found[repr(statistic)] for name, statistic in asked.items()}


def _finished(
    method: Any,
    repairs: tuple[Any, ...],
    measured: str,
    w: Any,
    solution: Solution,
    found: Mapping[str, Any],
) -> tuple[Solved, dict[str, Any]]:
    """With its repairs and its static range; and its errors."""
    scale, zero, global_scale = solution.scale, solution.zero, None
    solution = replace(solution, scale=None, zero=None)
    calibrator = None if scale is not None else calibrator_of(method)
    if calibrator is not None:
        statistic = calibrator.statistic(method.activation.format)
        grid = calibrator.grid(method.activation.format, found[repr(statistic)])
        scale, zero, global_scale = grid.scale, grid.zero, grid.global_scale
    for repair in repairs:
        solution = repair.repair(w, solution, named(repair, found))
    exact = w.astype(jnp.float32)
    importance = found.get(repr(Hessian()), found.get(repr(SecondMoment())))
    errors = weight_error(w, solution)
    some = slice(None, None, max(1, w.shape[-1] // MEASURED_OUTPUTS))
    compared = (exact - _nearest(method, w), exact - solution.decoded(), exact)
    before, after, norm = (
        output_error(m[:, some], importance, measured) for m in compared
    )
    return Solved(solution, scale, zero, global_scale), {
        "error_before": before,
        "error": after,
        "norm": norm,
        "weight_error": errors[0],
        "weight_norm": errors[1],
        "bad_weights": jnp.sum(~jnp.isfinite(w)),
        "notes": dict(solution.notes),
    }


def _nearest(method: Any, w: Any) -> Any:
    """The weights rounded to nearest in the method's format."""
    grid = method.format.fit(w)
    return method.format.from_codes(method.format.to_codes(w, grid), grid)


def output_error(delta: Any, importance: Any, measured: str) -> Any:
    """`E|x delta|^2` of a matrix `delta[K, N]`."""
    if measured == "output":
        return jnp.sum(delta * jnp.matmul(importance, delta, precision="highest"))
    weights = importance[:, None] if measured == "diagonal" else jnp.float32(1)
    return jnp.sum(jnp.square(delta) * weights)
