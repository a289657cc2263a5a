"""The transform across blocks of features: additions, and nothing is moved.

Features are cut into blocks of `width`; block `i` of a factor's row is `parts[i]`, and
within a block the transform is one product with a Hadamard matrix of `width`.
"""

from typing import Any

import numpy as np


def across(parts: list[Any], factor: np.ndarray) -> list[Any]:
    """`factor (x) H` over a list: `y_j = sum_i (factor (x) H)[i, j] parts_i`."""
    m = factor.shape[0]
    length = len(parts) // m
    rows = [walsh(parts[i * length : (i + 1) * length]) for i in range(m)]
    if m == 1:
        return rows[0]
    return [
        _signed_sum([row[at] for row in rows], factor[:, j])
        for j in range(m)
        for at in range(length)
    ]


def walsh(parts: list[Any]) -> list[Any]:
    """Sylvester's transform of a list whose length is a power of two."""
    if len(parts) == 1:
        return parts
    half = len(parts) // 2
    first, second = walsh(parts[:half]), walsh(parts[half:])
    sums = [a + b for a, b in zip(first, second)]
    return sums + [a - b for a, b in zip(first, second)]


def _signed_sum(parts: list[Any], signs: np.ndarray) -> Any:
    total = parts[0] if signs[0] > 0 else -parts[0]
    for part, sign in zip(parts[1:], signs[1:]):
        total = total + part if sign > 0 else total - part
    return total
