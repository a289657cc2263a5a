"""One product beside XLA's forms and other libraries' kernels, whole calls, on TPUs.

    PYTHONPATH=.venv/libtpu:.venv/peers python kernels/bench/peers.py
    ... python kernels/bench/peers.py v6e 16        one generation, one M
    ... python kernels/bench/peers.py XLA           one library

It appends what peers.jsonl lacks. Every form is compiled in a process of its own, which
may take `SECONDS` of processor time. For a kernel, cycles of a call are its grid steps
times the largest of its bundles, the cycles in which memory delivers what a step reads
and those of its products; what XLA does before the kernel, and what codes tokens, is
added. Ours count all of their branches; a peer's count one way through them, and the
blocks that are fastest of those tried. What quantizes tokens is counted in the first
step of each block of them, where it is a branch of its own (`branches.py`). For XLA's
own operations they are what XLA estimates, conversions of codes not included, and no
less than the limits, which it may leave out. The limits are those of the whole call. A
peer that does not compile is written down with what it said.
"""

import json
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import schedule
from aot import compiled
from branches import longest, together
from forms.form import Form
from peer_kernels import on
from products import CASES, KINDS, by_xla, cases, ours, peers
from programs import context

from qjax.results import Record, append, read

OUT = Path(__file__).parent / "peers.jsonl"
SECONDS, ONE = 300, "--one"


def main(words: list[str]) -> None:
    """Measure what is not there yet."""
    known = {record.label for record in read(OUT)} if OUT.exists() else set()
    for kind in range(len(KINDS)):
        for generation, M in CASES:
            case = cases(generation, M)[kind]
            for name in dict.fromkeys(name for name, _ in forms(case)):
                where = {generation, str(M), KINDS[kind], name.split(",")[0]}
                label = f"{generation} {KINDS[kind]} M={M} {name}"
                if set(words) <= where and label not in known:
                    measure(case, name, label)


def forms(case: Any) -> list[tuple[str, Form]]:
    """Every form of one case, by name; a name may have several sizes of blocks."""
    named = [(f"XLA, {name}", form) for name, form in by_xla(case)]
    return [*named, ("Pallas, ours", ours(case)), *peers(case)]


def measure(case: Any, name: str, label: str) -> None:
    """Write down the best of one form."""
    every = forms(case)
    at = [i for i, (other, _) in enumerate(every) if other == name]
    tried = [apart(case, i, name) for i in at]
    found, refused = min(tried, key=lambda pair: pair[0].get("over_limit", 1e9))
    print(label, found, refused, flush=True)
    config = {"refused": refused} if refused else {}
    append(OUT, Record(label, config, found, context(case.program())))


def apart(case: Any, at: int, name: str) -> tuple[dict[str, Any], str]:
    """What a form costs, in another process, or what a peer says instead.

    Raises:
      RuntimeError: a form that is no peer's fails, or any process ends for another
        reason than its limit.
    """
    kind = str(case.int8 + (case.bits == 8))
    command = [sys.executable, __file__, ONE, case.generation, str(case.M), kind]
    limit = (SECONDS, SECONDS + 1)
    done = subprocess.run(
        [*command, str(at)],
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CPU, limit),
    )
    if done.returncode == -signal.SIGXCPU:
        return {}, f"is not compiled in {SECONDS} s of processor time"
    if done.returncode:
        raise RuntimeError(f"{name} ended with {done.returncode}")
    found, refused = json.loads(done.stdout.splitlines()[-1])
    return found, refused


def one(generation: str, M: str, kind: str, at: str) -> None:
    """Print what one form costs."""
    case = cases(generation, int(M))[int(kind)]
    name, form = forms(case)[int(at)]
    print(json.dumps(attempt(case, form, name)))


def attempt(case: Any, form: Form, name: str) -> tuple[dict[str, Any], str]:
    """What a form costs, or what a peer says instead."""
    own = name.startswith("Pallas")
    known = schedule.OverflowedError if own or name.startswith("XLA") else Exception
    try:
        return cost(case, form, own), ""
    except known as error:  # whatever a peer raises is its result
        return {}, f"{type(error).__name__}: {str(error).splitlines()[0]}"


def cost(case: Any, form: Form, own: bool) -> dict[str, Any]:
    """Cycles of a call beside its limits."""
    schedule.clear()
    with on(case.generation):
        program = compiled(case.generation, form.function, *form.arguments)
    text, temporaries = program.as_text(), program.memory_analysis()
    cycles = schedule.estimated(text)
    steps, step_bytes, bundles, later = 0, 0.0, 0, 0
    if form.kernel:
        assert isinstance(form.steps, tuple)
        steps, step_bytes = form.steps
        bundles, later = kernel_bundles(form.kernel, own)
    schedule.clear()
    memory = schedule.memory_cycles(case.generation, form.least)
    products = schedule.product_cycles(case.generation, form.products, form.contract)
    if steps:
        # No step ends before its memory and its products; what comes before the
        # kernel, and the coding of tokens in a first step, is not hidden behind them.
        waits = schedule.memory_cycles(case.generation, step_bytes)
        waits = max(waits, memory / steps, products / steps)
        cycles += form.firsts * (max(later, waits) + bundles - later)
        cycles += (steps - form.firsts) * max(later, waits)
    cycles = max(cycles, memory, products)  # XLA's estimate may be less
    return {
        "bundles": bundles or None,
        "later_bundles": later or None,
        "steps": steps or None,
        "thousand_cycles": cycles / 1e3,
        "hbm_thousand_cycles": memory / 1e3,
        "mxu_thousand_cycles": products / 1e3,
        "over_limit": cycles / max(memory, products),
        "temporary_megabytes": temporaries.temp_size_in_bytes / 1e6,
    }


def kernel_bundles(kernel: str, own: bool) -> tuple[int, ...]:
    """Of a first step of a block of tokens, and of a later one."""
    texts = [
        path.read_text()
        for path in schedule.DUMP.glob("*-final_bundles.txt")
        if kernel in path.name and "analysis" not in path.name
    ]
    if len(texts) != 1:
        raise RuntimeError(f"{len(texts)} schedules are named {kernel!r}")
    return together(texts[0]) if own else longest(texts[0])


if __name__ == "__main__":
    sys.exit(one(*sys.argv[2:]) if ONE in sys.argv else main(sys.argv[1:]))
