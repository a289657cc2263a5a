"""One product beside XLA's forms and other libraries' kernels, whole calls, on TPUs.

    PYTHONPATH=.venv/libtpu:.venv/peers python kernels/bench/peers.py
    ... python kernels/bench/peers.py v6e 16        one generation, one M

It appends what peers.jsonl lacks. For a kernel, cycles of a call are its grid steps
times the larger of its bundles and the cycles in which memory delivers what a step
reads. Ours count all of their branches; a peer's count one way through them
(`branches.py`), and the blocks that are fastest of those tried. For XLA's own
operations they are what XLA estimates, conversions of codes not included, and no less
than the limits, which it may leave out. The limits are those of the whole call. A peer
that does not compile is written down with what it said.
"""

import sys
from pathlib import Path
from typing import Any

import schedule
from aot import compiled
from branches import longest
from forms.form import Form
from peer_kernels import on
from products import CASES, KINDS, by_xla, cases, ours, peers
from programs import context

from qjax.results import Record, append, read

OUT = Path(__file__).parent / "peers.jsonl"


def main(words: list[str]) -> None:
    """Measure what is not there yet."""
    known = {record.label for record in read(OUT)} if OUT.exists() else set()
    for kind in range(len(KINDS)):
        for generation, M in CASES:
            if set(words) <= {generation, str(M), KINDS[kind]}:
                measure(cases(generation, M)[kind], known)


def measure(case: Any, known: set[str]) -> None:
    """Every form of one case."""
    named = [(f"XLA, {name}", form) for name, form in by_xla(case)]
    named += [("Pallas, ours", ours(case)), *peers(case)]
    kind = KINDS[case.int8 + (case.bits == 8)]
    for name in dict.fromkeys(name for name, _ in named):
        label = f"{case.generation} {kind} M={case.M} {name}"
        if label in known:
            continue
        tried = [attempt(case, form, name) for n, form in named if n == name]
        found, refused = min(tried, key=lambda pair: pair[0].get("over_limit", 1e9))
        print(label, found, refused, flush=True)
        config = {"refused": refused} if refused else {}
        append(OUT, Record(label, config, found, context(named[0][1])))


def attempt(case: Any, form: Form, name: str) -> tuple[dict[str, Any], str]:
    """What a form costs, or what a peer says instead."""
    if name.startswith(("XLA", "Pallas")):
        return cost(case, form, own=name.startswith("Pallas")), ""
    try:
        return cost(case, form, own=False), ""
    except Exception as error:  # whatever a peer raises is its result
        return {}, f"{type(error).__name__}: {str(error).splitlines()[0]}"


def cost(case: Any, form: Form, own: bool) -> dict[str, Any]:
    """Cycles of a call beside its limits."""
    schedule.clear()
    with on(case.generation):
        program = compiled(case.generation, form.function, *form.arguments)
    text, temporaries = program.as_text(), program.memory_analysis()
    cycles = schedule.estimated(text)
    steps, bundles = 0, 0
    if form.kernel:
        steps, step_bytes = form.steps
        bundles = kernel_bundles(form.kernel, own)
        memory = schedule.memory_cycles(case.generation, step_bytes)
        cycles += steps * max(bundles, memory)
    schedule.clear()
    memory = schedule.memory_cycles(case.generation, form.least)
    products = schedule.product_cycles(case.generation, form.products, form.contract)
    cycles = max(cycles, memory, products)  # XLA's estimate may be less
    return {
        "bundles": bundles or None,
        "steps": steps or None,
        "thousand_cycles": cycles / 1e3,
        "hbm_thousand_cycles": memory / 1e3,
        "mxu_thousand_cycles": products / 1e3,
        "over_limit": cycles / max(memory, products),
        "temporary_megabytes": temporaries.temp_size_in_bytes / 1e6,
    }


def kernel_bundles(kernel: str, own: bool) -> int:
    """Of one step."""
    if own:
        counts = schedule.bundle_counts()
        return sum(n for name, n in counts.items() if f"-{kernel}." in name)
    texts = [
        path.read_text()
        for path in schedule.DUMP.glob("*-final_bundles.txt")
        if kernel in path.name and "analysis" not in path.name
    ]
    if len(texts) != 1:
        raise RuntimeError(f"{len(texts)} schedules are named {kernel!r}")
    return longest(texts[0])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
