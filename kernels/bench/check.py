"""Compile the gate set; fail on an error, or where a metric is above its budget.

python kernels/bench/check.py               compare with budget/*.jsonl
python kernels/bench/check.py --write       measure what budget/*.jsonl lack
python kernels/bench/check.py v5e           one kind of hardware only
python kernels/bench/check.py int_matmul    one file of gates/ only
python kernels/bench/check.py --expect=tpu  fail if a compiler of TPU programs lacks

Compilers for TPUs and for GPUs do not live in one process: programs whose compiler is
not installed are counted, and left to a run that has it. With no compiler at all
nothing is checked, and that is a failure.
"""

import sys
import time

import ptx  # noqa: F401  # sets what must be set before JAX is imported
import schedule  # noqa: F401  # as does this
from programs import Program, budget_of, context, gates, missing

from qjax.results import Record, append, read


def complaint(now: Record, budget: Record | None, budgeted: tuple[str, ...]) -> str:
    """What is wrong with a measurement; empty if nothing is."""
    if budget is None:
        return "is not in its budget; run with --write"
    if now.config != budget.config:
        return "has another config than its budget; remove its line and --write"
    over = [
        f"has {now.metrics[name]} {name}, {budget.metrics[name]} allowed"
        for name in budgeted
        if name in budget.metrics and now.metrics[name] > budget.metrics[name]
    ]
    return "; ".join(over)


def chosen(name: str, program: Program, words: list[str]) -> bool:
    """Whether the command line asks for a program."""
    return not words or name in words or program.label.split()[0] in words


def checked(name: str, program: Program, budgets: dict[str, Record], writes: bool):
    """Measure one program, write it down or compare; what is wrong, or empty."""
    start = time.monotonic()
    metrics = program.measure()
    seconds = time.monotonic() - start
    record = Record(program.label, program.config, metrics, context(program))
    counts = ", ".join(f"{metrics[key]} {key}" for key in program.budgeted)
    print(f"{program.label}: {counts}, {seconds:.0f} s", flush=True)
    if writes:
        append(budget_of(name), record)
        return ""
    wrong = complaint(record, budgets.get(program.label), program.budgeted)
    return f"{program.label} {wrong}" if wrong else ""


def lacking(asked: list[Program], absent: list[Program], expected: list[str]) -> str:
    """What is wrong with the compilers that are not here; empty if nothing is."""
    if not asked:
        return "nothing is checked: no program is so called"
    if not absent:
        return ""
    without = sorted({name for program in absent for name in missing(program)})
    said = f"no {', '.join(without)} here"
    if len(absent) == len(asked):
        return f"nothing is checked: {said}"
    print(f"{len(absent)} programs are left: {said}")
    platforms = sorted({p.platform for p in absent} & set(expected))
    return f"programs for {', '.join(platforms)} are expected" if platforms else ""


def main(arguments: list[str]) -> str | None:
    """Check or write; the return value is the complaint."""
    if sys.version_info >= (3, 12):
        print("skipped: budgets are those of JAX 0.10.2 on Python 3.11, its compilers")
        return None
    writes = "--write" in arguments
    words = [word for word in arguments if not word.startswith("--")]
    expected = [w.partition("=")[2] for w in arguments if w.startswith("--expect=")]
    wrong, asked, absent = [], [], []
    for name, programs in gates().items():
        asked += [p for p in programs if chosen(name, p, words)]
        absent += [p for p in programs if missing(p) and chosen(name, p, words)]
        path = budget_of(name)
        budgets = {r.label: r for r in read(path)} if path.exists() else {}
        wrong += [
            checked(name, program, budgets, writes)
            for program in programs
            if chosen(name, program, words)
            and not missing(program)
            and not (writes and program.label in budgets)
        ]
    wrong.append(lacking(asked, absent, expected))
    return "\n".join(line for line in wrong if line) or None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
