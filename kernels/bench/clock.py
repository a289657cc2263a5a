"""What the compiler for TPUs believes of the clock and of the matrix unit.

    PYTHONPATH=.venv/libtpu python kernels/bench/clock.py     writes clock.jsonl anew

Pallas knows peak rates and no clock. Two readings of one: the peak rate over
`schedule.SQUARES` products a cycle; and how many bytes XLA's estimate of an elementwise
operation moves in a cycle, with the share of the peak that it takes for granted, which
is that of v5e at its clock by the first reading. Beside them are products (of one token
by a square of the unit's width) per cycle: in XLA's estimates of large products, and in
the schedule of a kernel that is one product.
"""

import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import schedule
from aot import TOPOLOGIES, compiled
from jax.experimental import pallas as pl

from qjax.results import Record, append, environment
from qjax_kernels.compat import chip

OUT = Path(__file__).parent / "clock.jsonl"
LARGE = ((2048, 8192, 8192), (2048, 16384, 4096), (1024, 16384, 8192))
SMALL = (512, 2048, 512)
ROWS, COLUMNS = 2**18, 2**10
shape = jax.ShapeDtypeStruct


def elementwise(x: Any) -> Any:
    """Reads and writes once."""
    return x * 2 + 1


def product(x: Any, w: Any) -> Any:
    """XLA's own."""
    return x @ w


def kernel(x: Any, w: Any) -> Any:
    """One product in one step."""

    def body(x: Any, w: Any, out: Any) -> None:
        out[...] = jnp.dot(x[...], w[...], preferred_element_type=jnp.float32)

    out = shape((x.shape[0], w.shape[1]), jnp.float32)
    return pl.pallas_call(body, out_shape=out, name="plain")(x, w)


def estimate(generation: str, f: Any, *shapes: Any) -> int:
    """Cycles by XLA."""
    return schedule.estimated(compiled(generation, f, *shapes).as_text())


def matrices(M: int, K: int, N: int) -> tuple[Any, Any]:
    """Shapes of a product in bfloat16."""
    return shape((M, K), jnp.bfloat16), shape((K, N), jnp.bfloat16)


def bytes_a_cycle(generation: str) -> float:
    """Of an elementwise operation, by XLA."""
    x = shape((ROWS, COLUMNS), jnp.float32)
    return 8 * ROWS * COLUMNS / estimate(generation, elementwise, x)


def squares(generation: str, sizes: tuple[int, int, int], cycles: float) -> float:
    """Products per cycle."""
    M, K, N = sizes
    return M * K * N / chip(generation).mxu_column_size ** 2 / cycles


def measure(generation: str) -> dict[str, float]:
    """The readings of one generation."""
    moved = {name: bytes_a_cycle(name) for name in ("v5e", generation)}
    rates = {name: chip(name).mem_bw_bytes_per_second for name in moved}
    share = moved["v5e"] * schedule.clock("v5e") / rates["v5e"]
    by_xla = [
        squares(generation, sizes, estimate(generation, product, *matrices(*sizes)))
        for sizes in LARGE
    ]
    found = schedule.compile_for(generation, "plain", kernel, *matrices(*SMALL))
    return {
        "gigahertz_by_products": schedule.clock(generation) / 1e9,
        "gigahertz_by_memory": share * rates[generation] / moved[generation] / 1e9,
        "products_a_cycle_by_xla": max(by_xla),
        "products_a_bundle_scheduled": squares(generation, SMALL, found.bundles),
    }


def main() -> None:
    """Write everything anew."""
    records = [
        Record(name, {"squares": schedule.SQUARES}, measure(name), environment())
        for name in TOPOLOGIES
    ]
    OUT.unlink(missing_ok=True)
    for record in records:
        print(record.label, record.metrics, flush=True)
        append(OUT, record)


if __name__ == "__main__":
    sys.exit(main())
