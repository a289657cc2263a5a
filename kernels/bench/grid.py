"""All formats at all shapes on all generations, each beside the least that XLA needs.

python kernels/bench/grid.py                     everything that grid.jsonl lacks
python kernels/bench/grid.py float_matmul v5e    one operation, one generation
python kernels/bench/grid.py v6e up 16           one projection's name, one M

It appends to grid.jsonl and continues where it stopped.

Time is estimated from schedules: steps of the grid times the larger of bundles and HBM
cycles, at the derived clock. XLA's is a bound from below for the same weight in qjax's
XLA form: bytes that must move, or products at the peak rate, whichever is longer.
"""

import importlib
import sys
from collections.abc import Iterator
from math import ceil
from typing import Any

import schedule  # before JAX: it sets the environment

# isort: split
import jax
import jax.numpy as jnp
from aot import TOPOLOGIES, compiled
from programs import HERE, context

from qjax.core.coded import encode
from qjax.core.layout import Layout
from qjax.core.qtensor import QTensor, SiteActs
from qjax.ops import Target, matmul
from qjax.results import Record, append, read
from qjax_kernels.compat import chip
from qjax_kernels.int_matmul.specs import SPECS, TOKENS

OUT = HERE / "grid.jsonl"


def cases(words: list[str]) -> Iterator[tuple[str, Any]]:
    """Label and case of everything that the command line asks for, small M first."""
    shapes = {(spec.K, spec.N): spec for spec in reversed(SPECS)}
    ops = [
        importlib.import_module(f"gates.{path.stem}")
        for path in sorted((HERE / "gates").glob("*.py"))
    ]
    for M in TOKENS:
        for generation in TOPOLOGIES:
            for spec in shapes.values():
                for op in (op for op in ops if hasattr(op, "grid")):
                    known = {generation, op.__name__.split(".")[1], spec.name, str(M)}
                    if set(words) <= known:
                        for case in op.grid(generation, M, spec.K, spec.N):
                            yield case.program().label, case


def xla_form(case: Any) -> tuple[Any, tuple[Any, Any]]:
    """The case in qjax's XLA form, and the shapes of its arguments."""
    format, tokens = case.stored
    w = jax.ShapeDtypeStruct((case.K, case.N), jnp.bfloat16)
    acts = () if tokens is None else (SiteActs(activation=tokens),)
    layout = Layout("kn", (case.K, case.N))
    leaf = jax.eval_shape(
        lambda w: QTensor.of(encode(w, format), layout, jnp.bfloat16, acts), w
    )
    x = jax.ShapeDtypeStruct((case.M, case.K), jnp.bfloat16)
    target = Target("tpu", case.generation)

    def run(x: Any, leaf: QTensor) -> jax.Array:
        return matmul(x, leaf, implementation="xla", target=target)

    return run, (x, leaf)


def xla_microseconds(case: Any, contract: str) -> float:
    """What XLA's form takes at least."""
    run, shapes = xla_form(case)
    found = compiled(case.generation, run, *shapes).memory_analysis()
    moved = found.argument_size_in_bytes + found.output_size_in_bytes
    moved += 2 * found.temp_size_in_bytes
    memory = moved / chip(case.generation).mem_bw_bytes_per_second
    products = case.M * case.K * case.N
    cycles = schedule.product_cycles(case.generation, products, contract)
    return 1e6 * max(memory, cycles / schedule.clock(case.generation))


def measure(label: str, case: Any) -> Record:
    """One record."""
    program = case.program()
    found, blocks = program.measure(), program.config["blocks"]
    steps = ceil(case.M / blocks["m"]) * ceil(case.N / blocks["n"])
    steps *= ceil(case.K / blocks["k"])
    cycles = steps * max(found["bundles"], found["hbm_cycles"])
    metrics = {
        "kernel_microseconds": 1e6 * cycles / schedule.clock(case.generation),
        "xla_microseconds": xla_microseconds(case, program.contract),
        "bundles": found["bundles"],
        "over_limit": found["over_limit"],
    }
    return Record(label, program.config, metrics, context(program))


def main(words: list[str]) -> None:
    """Measure what is not there yet."""
    there = {record.label for record in read(OUT)} if OUT.exists() else set()
    for label, case in cases(words):
        if label not in there:
            record = measure(label, case)
            append(OUT, record)
            print(label, record.metrics, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
