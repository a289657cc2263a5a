"""The multiple-choice knapsack against trying everything."""

from itertools import product

import numpy as np
import pytest

from qjax.core.knapsack import choose_under_budget


def brute_force(sizes, costs, budget):
    rows = range(len(sizes))
    return min(
        sum(costs[i, c] for i, c in zip(rows, pick))
        for pick in product(range(sizes.shape[1]), repeat=len(sizes))
        if sum(sizes[i, c] for i, c in zip(rows, pick)) <= budget
    )


def value(table, picks):
    return table[np.arange(len(table)), list(picks)].sum()


@pytest.mark.parametrize("seed", range(40))
def test_least_cost_is_that_of_brute_force(seed):
    rng = np.random.default_rng(seed)
    items, choices = int(rng.integers(1, 8)), int(rng.integers(1, 5))
    sizes = rng.integers(0, 30, (items, choices))
    costs = rng.random((items, choices)) * 10.0 ** rng.integers(-6, 6)
    if seed % 3 == 0:  # ties and costs that do not fall with size
        costs = np.round(costs, -int(np.floor(np.log10(costs.max()))))
    least, most = sizes.min(1).sum(), sizes.max(1).sum()
    for budget in np.linspace(least, most + 1, 5).astype(int):
        picks = choose_under_budget(sizes, costs, int(budget))
        assert value(sizes, picks) <= budget
        wanted = brute_force(sizes, costs, budget)
        np.testing.assert_allclose(value(costs, picks), wanted, rtol=1e-8, atol=0)


@pytest.mark.parametrize("kinds", [4, 400])
def test_large_models_are_solved_as_exactly(kinds):
    # 560 sites of few sizes, and 560 of many, against the bound of the relaxation
    # (dual: the best multiplier), from which one item at most separates the optimum.
    rng = np.random.default_rng(kinds)
    weights = rng.choice(rng.integers(1000, 9000, kinds), 560)
    sizes = weights[:, None] * np.array([3, 4, 8])
    scale = rng.lognormal(0, 2, 560)
    costs = scale[:, None] * np.array([4.0, 1.0, 0.004])
    budget = int(5 * weights.sum())
    picks = choose_under_budget(sizes, costs, budget)
    assert value(sizes, picks) <= budget
    multipliers = np.geomspace(1e-8, 1e-1, 4000)
    dual = max((costs + m * sizes).min(1).sum() - m * budget for m in multipliers)
    assert dual <= value(costs, picks) <= 1.001 * dual


def test_a_budget_below_the_smallest_says_so():
    with pytest.raises(
        ValueError, match="budget is 9, but the smallest choices take 10"
    ):
        choose_under_budget(np.array([[5, 8], [5, 6]]), np.ones((2, 2)), 9)


@pytest.mark.parametrize("bad", [np.nan, -1.0])
def test_costs_that_are_none(bad):
    with pytest.raises(ValueError, match="finite and not negative"):
        choose_under_budget(np.ones((2, 2)), np.full((2, 2), bad), 9)
