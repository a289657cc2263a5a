"""All operations, formats and shapes on all generations of TPU.

python kernels/bench/grid.py                     everything that grid.jsonl lacks
python kernels/bench/grid.py float_matmul v5e    one operation, one generation
python kernels/bench/grid.py v6e up 16           a shape's name, and tokens

Tokens are rows; of attention they are sequences, with one token each. It appends to
grid.jsonl and continues where it stopped.

Time is estimated from schedules: steps of the grid times the largest of bundles, HBM
and MXU cycles, at the derived clock. Products of a matrix stand beside XLA's: a bound
from below for the same weight in qjax's XLA form, bytes that must move or products at
the peak rate, whichever is longer. `beside.py` has XLA's form of the other operations.
"""

import importlib
import sys
from collections.abc import Iterator
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

OUT = HERE / "grid.jsonl"
LIMITS = ("bundles", "hbm_cycles", "mxu_cycles")


def cases(words: list[str]) -> Iterator[tuple[str, Any]]:
    """Label and case of everything that the command line asks for, small M first."""
    ops = [
        importlib.import_module(f"gates.{path.stem}")
        for path in sorted((HERE / "gates").glob("*.py"))
    ]
    found = [
        (generation, op.__name__.split(".")[1], name, case)
        for generation in TOPOLOGIES
        for op in ops
        if hasattr(op, "grid")
        for name, case in op.grid(generation)
    ]
    for generation, op, name, case in sorted(found, key=lambda each: tokens(each[3])):
        if set(words) <= {generation, op, name, str(tokens(case))}:
            yield case.program().label, case


def tokens(case: Any) -> int:
    """Rows of a case, or the sequences of attention."""
    case = getattr(case, "of", case)
    return case.M if hasattr(case, "M") else case.B


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
    found = program.measure()
    cycles = program.steps * max(found[name] for name in LIMITS)
    matrix = hasattr(case, "stored")
    least = xla_microseconds(case, program.contract) if matrix else None
    metrics = {
        "kernel_microseconds": 1e6 * cycles / schedule.clock(program.generation),
        "xla_microseconds": least,
        "bundles": found["bundles"],
        "over_limit": found["over_limit"],
    }
    return Record(label, program.config, metrics, context(program))


def main(words: list[str]) -> str | None:
    """Measure what is not there yet; the return value is what did not compile.

    What a kernel refuses is said; a compiler's error ends one program, not the rest.
    """
    there = {record.label for record in read(OUT)} if OUT.exists() else set()
    failed = []
    for label, case in cases(words):
        if label in there:
            continue
        try:
            record = measure(label, case)
        except ValueError as refused:
            print(f"{label} is refused: {refused}", flush=True)
            continue
        except jax.errors.JaxRuntimeError as error:
            failed.append(f"{label} does not compile: {str(error).splitlines()[0]}")
            print(failed[-1], flush=True)
            continue
        append(OUT, record)
        print(label, record.metrics, flush=True)
    return "\n".join(failed) or None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
