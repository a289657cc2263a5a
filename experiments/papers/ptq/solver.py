"""Seconds of GPTQ's solver on one matrix: `results/solver.jsonl`.

    python experiments/papers/ptq/solver.py
    python scripts/render_tables.py

Beside the best of several warm calls stand the first call, which compiles, and the time
that the machine needs for as many float32 operations in one large product: a Cholesky
factor (`K^3 / 3`), and a product with a triangle for the errors passed on (`K^2 N`).
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import qjax
from qjax.results import Record, append, environment

OUT = Path(__file__).parent / "results" / "solver.jsonl"


@dataclass(frozen=True)
class Options:
    """What to measure."""

    shapes: tuple[tuple[int, int], ...] = ((1024, 1024), (2048, 2048), (4096, 4096))
    """`K, N` of the matrices."""
    scheme: str = "W4A16"
    """Formats."""
    repeats: int = 5
    """Warm calls."""


def seconds(f: Callable[..., Any], *args: Any) -> float:
    """Of one call."""
    start = time.perf_counter()
    jax.block_until_ready(f(*args))
    return time.perf_counter() - start


def flops_per_second(size: int = 3072) -> float:
    """Of a float32 product, the best of five."""
    a = jnp.ones((size, size), jnp.float32)
    product = jax.jit(jnp.matmul)
    best = min(seconds(product, a, a) for _ in range(6))
    return 2 * size**3 / best


def measure(K: int, N: int, options: Options, rate: float) -> Record:
    """One matrix, on inputs whose features are correlated."""
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=(K, N)), jnp.float32)
    mix = rng.normal(size=(K, K)) / K**0.5 + np.eye(K)
    x = jnp.asarray(rng.normal(size=(2 * K, K)) @ mix, jnp.float32)
    hessian = jax.jit(lambda x: x.T @ x / len(x))(x)
    method = qjax.GPTQ(options.scheme)
    solve = jax.jit(lambda w, h: method.solve_site(w, {"hessian": h}))
    first = seconds(solve, w, hessian)
    warm = min(seconds(solve, w, hessian) for _ in range(options.repeats))
    metrics = {
        "cold_seconds": first,
        "warm_seconds": warm,
        "limit_seconds": (K**3 / 3 + K**2 * N) / rate,
        "gflops_of_a_product": rate / 1e9,
    }
    config = {"scheme": options.scheme, "K": K, "N": N}
    return Record(f"{K} x {N}", config, metrics, environment())


def main(options: Options) -> None:
    """All shapes."""
    partial = OUT.with_name(f".{OUT.name}.part")
    partial.unlink(missing_ok=True)
    rate = flops_per_second()
    for K, N in options.shapes:
        record = measure(K, N, options, rate)
        print(record.label, record.metrics, flush=True)
        append(partial, record)
    partial.replace(OUT)


if __name__ == "__main__":
    main(tyro.cli(Options))
