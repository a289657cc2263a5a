"""The products that `h200.py` times: their arrays, the same for every form and peer."""

from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

import ml_dtypes
import numpy as np

GROUP, L2_BYTES = 128, 60 * 2**20


@dataclass(frozen=True)
class Problem:
    """`x[M, K] @ w[K, N]` and its arrays, drawn from one seed."""

    K: int
    N: int
    M: int
    bits: int = 4
    group: int | None = GROUP
    zero: str | None = None

    def eight(self) -> "Problem":
        """The same product with 8-bit weights, one scale for each output."""
        return replace(self, bits=8, group=None, zero=None)

    def codes(self) -> np.ndarray:
        """`q[K, N]`."""
        return _codes(self.K, self.N, self.bits)

    def float8(self) -> np.ndarray:
        """`q[K, N]` in e4m3fn."""
        return _float8(self.K, self.N)

    def scale(self) -> np.ndarray:
        """`[G, N]`, float32 that bfloat16 holds."""
        shape = self.K // (self.group or self.K), self.N
        scale = np.random.default_rng(1).uniform(0.005, 0.02, shape)
        return _rounded(scale)

    def zeros(self) -> np.ndarray | None:
        """`[G, N]`, of `q`."""
        if self.zero is None:
            return None
        half = 2 ** (self.bits - 1)
        draw = np.random.default_rng(2).normal(0, half / 2, self.scale().shape)
        return draw.round(2 * (self.zero == "float32")).clip(-half, half - 1)

    def tokens(self) -> np.ndarray:
        """`x[M, K]`, float32 that bfloat16 holds."""
        return _rounded(np.random.default_rng(3).normal(size=(self.M, self.K)))

    def weight(self, float8: bool = False) -> np.ndarray:
        """`w[K, N]` in float64: what codes, zeros and scales stand for."""
        group, zero = self.group or self.K, self.zeros()
        q = (self.float8() if float8 else self.codes()).astype(np.float64)
        if zero is not None:
            q = q - zero.astype(self.zero).astype(np.float64).repeat(group, 0)
        return q * self.scale().astype(np.float64).repeat(group, 0)

    def words(self) -> np.ndarray:
        """Codes `q + 2^(bits-1)`, LSB first along K, `uint32[K*bits/32, N]`.

        The order of GPTQ's `qweight`.
        """
        per_word = 32 // self.bits
        u = (self.codes().astype(np.int64) + 2 ** (self.bits - 1)).astype(np.uint32)
        fields = u.reshape(-1, per_word, self.N)
        shifts = self.bits * np.arange(per_word, dtype=np.uint32)
        return np.bitwise_or.reduce(fields << shifts[:, None], axis=1)

    def size(self, bits: int) -> int:
        """Bytes of the codes alone."""
        return self.K * self.N * bits // 8

    def copies(self, bits: int) -> int:
        """Weights in turn, so that none is still in the cache."""
        return max(2, -(-3 * L2_BYTES // self.size(bits)))

    def row(self, form: str, seconds: float, bits: int, clock: str) -> dict[str, Any]:
        """One result; rates are those of codes alone, and of products."""
        products = 2 * self.M * self.K * self.N
        return {
            "form": form,
            **asdict(self),
            "clock": clock,
            "microseconds": seconds * 1e6,
            "weight_gigabytes_per_second": self.size(bits) / seconds / 1e9,
            "teraflops": products / seconds / 1e12,
        }


def error(y: Any, problem: Problem, float8: bool = False) -> float:
    """How far `y[M, N]` is from the product in float64, as a share of its size."""
    exact = problem.tokens().astype(np.float64) @ problem.weight(float8)
    return float(
        np.linalg.norm(np.asarray(y, np.float64) - exact) / np.linalg.norm(exact)
    )


@lru_cache(maxsize=2)
def _codes(K: int, N: int, bits: int) -> np.ndarray:
    half = 2 ** (bits - 1)
    return np.random.default_rng(0).integers(-half, half, (K, N), np.int8)


@lru_cache(maxsize=1)
def _float8(K: int, N: int) -> np.ndarray:
    draw = np.random.default_rng(0).normal(size=(K, N)).astype(np.float32)
    return draw.astype(ml_dtypes.float8_e4m3fn)


def _rounded(values: np.ndarray) -> np.ndarray:
    return values.astype(ml_dtypes.bfloat16).astype(np.float32)
