"""int8 products on this CPU, in the forms that qjax could give to XLA.

    python kernels/bench/cpu.py      writes cpu.jsonl

Tokens' codes and scales are found as for W8A8; the shortest of many runs counts, and
forms take turns, so that what else the machine does meets all of them.
"""

import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qjax.results import Record, append, environment

OUT = Path(__file__).parent / "cpu.jsonl"
K = N = 4096
TOKENS, ROUNDS, FILLED = (1, 8, 64), 15, 8
WEIGHTS = {"[K, N]": (0, False), "[N, K], turned": (0, True), "[N, K]": (1, False)}
"""How codes lie; which axis is contracted, and whether they are turned first."""


def form(axis: int, turned: bool, barrier: bool) -> Callable[..., Any]:
    """`x[M, K]` in float32 times int8 codes."""

    def run(x: Any, w: Any) -> Any:
        scale = jnp.max(jnp.abs(x), 1, keepdims=True) / 127
        codes = jnp.round(x / scale).astype(jnp.int8)
        codes = jnp.pad(codes, ((0, -len(x) % FILLED), (0, 0)))
        codes = lax.optimization_barrier(codes) if barrier else codes
        w = w.T if turned else w
        axes = (((1,), (axis,)), ((), ()))
        y = lax.dot_general(codes, w, axes, preferred_element_type=jnp.int32)
        return y[: len(x)].astype(jnp.float32) * scale

    return jax.jit(run)


def milliseconds(run: Callable[..., Any], *arguments: Any) -> float:
    """Of one call."""
    start = time.perf_counter()
    jax.block_until_ready(run(*arguments))
    return 1e3 * (time.perf_counter() - start)


def main() -> None:
    """Measure everything anew."""
    w = jax.random.randint(jax.random.key(0), (N, K), -128, 128, jnp.int8)
    forms = {
        f"{name}{', barrier' * barrier}": form(*how, barrier)
        for (name, how), barrier in product(WEIGHTS.items(), (False, True))
    }
    times = {name: dict[str, float]() for name in forms}
    for M in TOKENS:
        x = jax.random.normal(jax.random.key(1), (M, K))
        for run in forms.values():
            jax.block_until_ready(run(x, w))
        for _ in range(ROUNDS):
            for name, run in forms.items():
                before = times[name].get(f"milliseconds_m{M}", float("inf"))
                found = min(before, milliseconds(run, x, w))
                times[name][f"milliseconds_m{M}"] = found
    OUT.unlink(missing_ok=True)
    for name, metrics in times.items():
        print(name, metrics, flush=True)
        append(OUT, Record(name, {"K": K, "N": N}, metrics, environment()))


if __name__ == "__main__":
    main()
