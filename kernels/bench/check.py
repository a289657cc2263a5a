"""Compile the gate set for TPUs; fail on an error, or on more bundles than committed.

python kernels/bench/check.py            compare with budget.jsonl
python kernels/bench/check.py --write    measure what budget.jsonl lacks
python kernels/bench/check.py v5e        one generation only
"""

import sys
import time
from dataclasses import asdict
from pathlib import Path

import schedule
from programs import GATE, Program, context

from qjax.results import Record, append, read
from qjax_kernels.int_matmul.pallas_tpu import name_of

BUDGET = Path(__file__).parent / "budget.jsonl"


def measure(program: Program) -> Record:
    """Compile one program."""
    generation, blocks = program.generation, program.blocks
    name = name_of(program.weight, program.int8)
    found = schedule.compile_for(
        generation, name, program.function(), *program.arguments()
    )
    memory = schedule.memory_cycles(generation, program.weight_bytes(blocks))
    products = schedule.product_cycles(
        generation, blocks.m, blocks.k, blocks.n, program.int8
    )
    metrics = {
        "bundles": found.bundles,
        "hbm_cycles": memory,
        "mxu_cycles": products,
        "over_limit": max(found.bundles, memory) / max(memory, products),
        "bundles_beside": found.beside,
        "temporary_bytes": found.temporaries,
    }
    config = {"program": asdict(program), "blocks": asdict(blocks)}
    return Record(program.label, config, metrics, context())


def complaint(now: Record, budget: Record | None) -> str:
    """What is wrong with a measurement; empty if nothing is."""
    if budget is None:
        return "is not in budget.jsonl; run with --write"
    if now.config["blocks"] != budget.config["blocks"]:
        return "has other blocks than in budget.jsonl; remove its line and --write"
    bundles, allowed = now.metrics["bundles"], budget.metrics["bundles"]
    return f"has {bundles} bundles, {allowed} allowed" if bundles > allowed else ""


def main(arguments: list[str]) -> str | None:
    """Check or write; the return value is the complaint."""
    if sys.version_info >= (3, 12):
        print("nothing is checked: libtpu is pinned for JAX 0.10.2, on Python 3.11")
        return None
    writes = "--write" in arguments
    chosen = [word for word in arguments if word != "--write"]
    budgets = {r.label: r for r in read(BUDGET)} if BUDGET.exists() else {}
    wrong = []
    for program in GATE:
        if chosen and program.generation not in chosen:
            continue
        if writes and program.label in budgets:
            continue
        start = time.monotonic()
        record = measure(program)
        seconds = time.monotonic() - start
        print(f"{record.label}: {record.metrics['bundles']} bundles, {seconds:.0f} s")
        if writes:
            append(BUDGET, record)
        elif problem := complaint(record, budgets.get(record.label)):
            wrong.append(f"{record.label} {problem}")
    return "\n".join(wrong) or None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
