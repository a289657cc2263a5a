"""Hadamard matrices whose size is a power of two times a small factor.

Paley's two constructions (1933) from a prime q, both symmetric: of size q + 1 where
4 divides it, and of size 2 (q + 1) where 4 divides q - 1. Rows of the first are put in
another order, which keeps them orthogonal and makes the matrix symmetric.
"""

from functools import cache

import numpy as np


@cache
def small_factor(size: int) -> int:
    """The least `m` for which a Hadamard matrix is known and `size = m 2^k`.

    1 for powers of two; 12 for 768, 20 for 2560, 28 for 14336.

    Raises:
      ValueError: there is none.
    """
    odd = size
    while odd and odd % 2 == 0:
        odd //= 2
    m = odd
    while m and size % m == 0 and m <= size:
        if m == 1 or _first(m) or _second(m):
            return m
        m *= 2
    raise ValueError(
        "a Hadamard transform needs a power of two, alone or times 12, 20, 28 or "
        f"another size of Paley's, got {size}"
    )


@cache
def small_hadamard(m: int) -> np.ndarray:
    """The symmetric `[m, m]` matrix of 1 and -1 for an `m` of `small_factor`, int8.

    Raises:
      ValueError: `m` is not one.
    """
    if m == 1:
        return np.ones((1, 1), np.int8)
    if _first(m):
        q = m - 1
        at = np.arange(q)
        total = (at[:, None] + at) % q
        core = -_character(q)[total] - (total == 0)
        return np.pad(core, ((1, 0), (1, 0)), constant_values=1).astype(np.int8)
    if _second(m):
        q = m // 2 - 1
        at = np.arange(q)
        core = np.pad(_character(q)[(at[:, None] - at) % q], ((1, 0), (1, 0)))
        core[0, 1:] = core[1:, 0] = 1
        whole, zero = np.array([[1, 1], [1, -1]]), np.array([[1, -1], [-1, -1]])
        found = np.kron(core, whole) + np.kron(np.eye(q + 1, dtype=int), zero)
        return found.astype(np.int8)
    raise ValueError(f"no Hadamard matrix of Paley's has size {m}")


def _first(m: int) -> bool:
    return m % 4 == 0 and _prime(m - 1)


def _second(m: int) -> bool:
    return m % 4 == 0 and (m // 2 - 1) % 4 == 1 and _prime(m // 2 - 1)


def _prime(q: int) -> bool:
    return q > 1 and all(q % p for p in range(2, int(q**0.5) + 1))


def _character(q: int) -> np.ndarray:
    """0 for 0, 1 for squares modulo q, else -1."""
    found = np.full(q, -1)
    found[np.arange(q) ** 2 % q] = 1
    found[0] = 0
    return found
