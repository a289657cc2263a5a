"""The multiple-choice knapsack: one choice for each item, least cost under a budget.

Minimise `sum_i cost[i, c_i]` subject to `sum_i size[i, c_i] <= budget`. Exact: dynamic
programming over the (size, cost) pairs that no other dominates (Nemhauser and Ullmann,
1969), of which those are dropped that cannot beat a known solution even if the items
left were divisible (the linear relaxation of Sinha and Zoltners, 1979).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class _Hull(NamedTuple):
    """Least cost of some items, if divisible, by the size that they may take."""

    sizes: np.ndarray
    costs: np.ndarray

    def at(self, sizes: np.ndarray) -> np.ndarray:
        """A lower bound of the cost at each size; infinite where nothing fits."""
        bound = np.interp(sizes, self.sizes, self.costs)
        return np.where(sizes < self.sizes[0], np.inf, bound)


class _Front(NamedTuple):
    """Partial solutions that none dominates, by rising size."""

    sizes: np.ndarray
    costs: np.ndarray
    parents: np.ndarray
    choices: np.ndarray


def choose_under_budget(
    sizes: np.ndarray, costs: np.ndarray, budget: int
) -> tuple[int, ...]:
    """For each item the number of its choice.

    Args:
      sizes: `sizes[items, choices]`, whole numbers >= 0.
      costs: `costs[items, choices]`, finite and >= 0.
      budget: of the sum of sizes.

    Raises:
      ValueError: a table is not of that kind, or the smallest choices exceed the
        budget; the message says by how much.
    """
    sizes, costs = np.asarray(sizes, np.int64), np.asarray(costs, np.float64)
    _check(sizes, costs, budget)
    # In units of the mean, so that the tolerance below means the same for all costs.
    costs = costs / max(float(costs.mean()), np.finfo(np.float64).tiny)
    hulls = _suffix_hulls(sizes, costs)
    best = _rounded_down(sizes, costs, budget)
    return _backtrack(_fronts(sizes, costs, budget, hulls, best))


def _check(sizes: np.ndarray, costs: np.ndarray, budget: int) -> None:
    if sizes.ndim != 2 or sizes.shape != costs.shape or not sizes.size:
        raise ValueError(
            f"sizes {sizes.shape} and costs {costs.shape} must both be [items, choices]"
        )
    if not (np.isfinite(costs).all() and (costs >= 0).all() and (sizes >= 0).all()):
        raise ValueError("sizes and costs must be finite and not negative")
    least = int(sizes.min(1).sum())
    if least > budget:
        raise ValueError(
            f"the budget is {budget}, but the smallest choices take {least}"
        )


def _lower_hull(sizes: np.ndarray, costs: np.ndarray) -> list[int]:
    """One item's choices on the lower convex hull, by rising size and falling cost."""
    hull: list[int] = []
    for i in np.lexsort((costs, sizes)):
        if hull and costs[i] >= costs[hull[-1]]:
            continue
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            rise = (costs[b] - costs[a]) * (sizes[i] - sizes[a])
            if rise < (costs[i] - costs[a]) * (sizes[b] - sizes[a]):
                break
            hull.pop()
        hull.append(int(i))
    return hull


def _steps(sizes: np.ndarray, costs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Increments `(size, cost)` along one item's hull; costs fall ever more slowly."""
    hull = _lower_hull(sizes, costs)
    return np.diff(sizes[hull]), np.diff(costs[hull])


def _suffix_hulls(sizes: np.ndarray, costs: np.ndarray) -> list[_Hull]:
    """For each `i` the relaxation of the items `i:`; the last is of none."""
    hulls = [_Hull(np.zeros(1), np.zeros(1))]
    grown, saved = np.zeros(0), np.zeros(0)
    base_size = base_cost = 0.0
    for each_sizes, each_costs in zip(sizes[::-1], costs[::-1]):
        first = _lower_hull(each_sizes, each_costs)[0]
        base_size += float(each_sizes[first])
        base_cost += float(each_costs[first])
        more = _steps(each_sizes, each_costs)
        grown, saved = np.append(grown, more[0]), np.append(saved, more[1])
        order = np.argsort(saved / grown, kind="stable")
        grown, saved = grown[order], saved[order]
        hulls.append(
            _Hull(
                base_size + np.concatenate([[0.0], np.cumsum(grown)]),
                base_cost + np.concatenate([[0.0], np.cumsum(saved)]),
            )
        )
    return hulls[::-1]


def _rounded_down(sizes: np.ndarray, costs: np.ndarray, budget: int) -> float:
    """The cost of a solution: along the hulls, steepest first, whatever still fits."""
    hulls = [_lower_hull(s, c) for s, c in zip(sizes, costs)]
    at = [0] * len(hulls)
    room = budget - sum(int(sizes[i, h[0]]) for i, h in enumerate(hulls))
    slopes = [
        (float(saved / grown), i, j)
        for i in range(len(hulls))
        for j, (grown, saved) in enumerate(zip(*_steps(sizes[i], costs[i])))
    ]
    for _, i, j in sorted(slopes):
        grown = int(sizes[i, hulls[i][j + 1]] - sizes[i, hulls[i][j]])
        if at[i] == j and grown <= room:
            at[i], room = j + 1, room - grown
    return sum(float(costs[i, h[a]]) for i, (h, a) in enumerate(zip(hulls, at)))


def _fronts(
    sizes: np.ndarray,
    costs: np.ndarray,
    budget: int,
    hulls: Sequence[_Hull],
    best: float,
) -> list[_Front]:
    """The partial solutions after each item that may still become the best."""
    slack = 1e-9 * max(best, 1.0)  # sums in another order differ in their last digits
    last = _Front(
        np.zeros(1, np.int64), np.zeros(1), np.zeros(1, int), np.zeros(1, int)
    )
    fronts = []
    for i, (each_sizes, each_costs) in enumerate(zip(sizes, costs)):
        size = (last.sizes[:, None] + each_sizes[None]).reshape(-1)
        cost = (last.costs[:, None] + each_costs[None]).reshape(-1)
        alive = cost + hulls[i + 1].at(budget - size) <= best + slack
        kept = np.flatnonzero(alive)
        kept = kept[np.lexsort((cost[kept], size[kept]))]
        lowest = np.minimum.accumulate(cost[kept])
        better = np.concatenate([[True], cost[kept][1:] < lowest[:-1]])
        kept = kept[better]
        parents, choices = np.divmod(kept, len(each_sizes))
        last = _Front(size[kept], cost[kept], parents, choices)
        fronts.append(last)
    return fronts


def _backtrack(fronts: Sequence[_Front]) -> tuple[int, ...]:
    place, choices = int(np.argmin(fronts[-1].costs)), []
    for front in reversed(fronts):
        choices.append(int(front.choices[place]))
        place = int(front.parents[place])
    return tuple(reversed(choices))
