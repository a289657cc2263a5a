"""Kernels beside XLA's own forms of the same operation, whole calls, on TPUs.

    python kernels/bench/beside.py               what beside.jsonl lacks
    python kernels/bench/beside.py kv_attention  one operation only

A call's cycles are those that XLA estimates for each of its own operations, memory
included, and for a kernel, XLA's grouped product among them, its grid steps times the
larger of its bundles and the cycles of the memory that a step reads. The limit is the
larger of what HBM and the matrix unit need at least for the call.
"""

import sys
from pathlib import Path
from typing import Any

import schedule
from aot import compiled
from forms import Form, forms
from programs import context

from qjax.results import Record, append, read

OUT = Path(__file__).parent / "beside.jsonl"


def measure(form: Form) -> dict[str, Any]:
    """Cycles of a call, and what it keeps in memory meanwhile."""
    schedule.clear()
    program = compiled(form.generation, form.function, *form.arguments)
    temporaries = program.memory_analysis().temp_size_in_bytes
    text = program.as_text()
    counts = schedule.bundle_counts()
    schedule.clear()
    own = [n for name, n in counts.items() if form.kernel and form.kernel in name]
    if form.kernel and not own:
        raise RuntimeError(f"libtpu wrote no schedule of {form.kernel!r}")
    steps, step_bytes = form.steps(text) if callable(form.steps) else form.steps
    step = schedule.memory_cycles(form.generation, step_bytes)
    cycles = schedule.estimated(text) + steps * max(sum(own), step)
    limit = max(
        schedule.memory_cycles(form.generation, form.least),
        schedule.product_cycles(form.generation, form.products, form.contract),
    )
    return {
        "thousand_cycles": cycles / 1e3,
        "limit_thousand_cycles": limit / 1e3,
        "over_limit": cycles / limit,
        "temporary_megabytes": temporaries / 1e6,
    }


def main(words: list[str]) -> None:
    """Measure what is not there yet."""
    known = {record.label for record in read(OUT)} if OUT.exists() else set()
    for form in forms(words):
        if form.label in known:
            continue
        metrics = measure(form)
        print(form.label, metrics, flush=True)
        append(OUT, Record(form.label, {}, metrics, context(form)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
