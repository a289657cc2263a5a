"""Plans as records and as a table, schemes side by side."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from qjax.plan.machines import Machine
from qjax.results import Record

GIB = 2**30
SAID_BY = (
    "Limits, not measurements. Fits, sizes and sent bytes are those of the compiler's "
    "final program; needed bytes and operations are counted from the jaxpr. limit: the "
    "needed bytes at full bandwidth or the operations at the peak rate, then what is "
    "sent; as compiled: the same with the bytes that the final program moves."
)
UNKNOWN = (
    "vector units (only counted)",
    "waiting of DMA and of kernels for each other",
    "real clocks",
    "latency of links, and slices whose rings are open",
    "fragmentation of memory",
    "autotuning on the card",
    "other requests beside a prefill, which is one sequence with logits of every token",
    "which experts tokens choose: all of them are read",
    "Pallas kernels on several devices: XLA's forms are what is compiled",
)
"""What the times and sizes leave out."""
HALVES = (
    "that two devices of one chip are joined by more than its links to other chips, "
    "of which each is given half"
)


def unknown(machine: Machine) -> tuple[str, ...]:
    """What the times and sizes of plans for a machine leave out."""
    return (*UNKNOWN, HALVES) if machine.per_chip > 1 else UNKNOWN


def merged(label: str, programs: Mapping[str, Mapping[str, Any]]) -> Record:
    """One record of the programs of a scheme, by step."""
    first = next(iter(programs.values()))
    given = ("scheme", "batch", "context", "prompt")
    return Record(
        label,
        {name: first[name] for name in given},
        {**summary(programs), "programs": dict(programs)},
        series=str(first["scheme"]),
    )


def summary(programs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What tables show: sizes of one device in GiB, times in milliseconds."""
    found: dict[str, Any] = {"fits": verdict(programs)}
    sizes = [p["needed_bytes"] for p in programs.values() if p.get("needed_bytes")]
    found["memory_GiB"] = max(sizes) / GIB if sizes else None
    for step, program in programs.items():
        found |= _of_step(step, program)
    for name in ("seconds", "cpu_seconds"):
        times = [p[name] for p in programs.values() if name in p]
        found[f"planning_{name}"] = sum(times) if times else None
    peaks = [p["peak_rss_bytes"] for p in programs.values() if "peak_rss_bytes" in p]
    found["planning_peak_MB"] = max(peaks) / 1e6 if peaks else None
    return found


def verdict(programs: Mapping[str, Mapping[str, Any]]) -> str:
    """ "yes", "no", or "failed" where a program could not be compiled."""
    if any("error" in program for program in programs.values()):
        return "failed"
    return "yes" if all(program["fits"] for program in programs.values()) else "no"


def compiled(record: Record) -> bool:
    """Whether the compiler had a result for any of the record's programs."""
    return any("error" not in p for p in record.metrics["programs"].values())


def _of_step(step: str, program: Mapping[str, Any]) -> dict[str, Any]:
    if "error" in program:
        return {}
    found = {
        f"{step}_{name}_ms": 1e3 * program[f"{name}_seconds"]
        for name in ("matrix", "memory", "links", "limit", "compiled")
        if f"{name}_seconds" in program
    }
    if step != "decode":
        return found
    for name in ("weights", "cache", "temporaries"):
        size = program.get(f"{name}_bytes")
        found[f"{name}_GiB"] = None if size is None else size / GIB
    if "limit_seconds" in program:
        found["tokens_per_s"] = program["tokens"] / program["limit_seconds"]
        found["links_MB"] = program["sent_bytes_per_device"] / 1e6
    found["MB_per_token"] = program["bytes_per_token"] / 1e6
    found["Gop_per_token"] = program["operations_per_token"] / 1e9
    return found


COLUMNS: Sequence[tuple[str, str, str]] = (
    ("fits", "fits", "{}"),
    ("weights_GiB", "weights\nGiB", "{:.2f}"),
    ("cache_GiB", "cache\nGiB", "{:.2f}"),
    ("temporaries_GiB", "temp.\nGiB", "{:.2f}"),
    ("memory_GiB", "all\nGiB", "{:.2f}"),
    ("decode_limit_ms", "decode\nlimit\nms", "{:.2f}"),
    ("decode_compiled_ms", "as\ncompiled\nms", "{:.2f}"),
    ("tokens_per_s", "tokens/s\nat limit", "{:,.0f}"),
    ("prefill_limit_ms", "prefill\nlimit\nms", "{:.1f}"),
    ("prefill_compiled_ms", "as\ncompiled\nms", "{:.1f}"),
    ("MB_per_token", "MB per\ntoken", "{:,.1f}"),
    ("Gop_per_token", "Gop per\ntoken", "{:,.1f}"),
    ("links_MB", "sent\nMB", "{:,.1f}"),
)


def table(records: Sequence[Record], machine: Machine, model: str) -> Table:
    """Plans for one machine; sizes and bytes sent are those of one device."""
    drawn = Table(
        title=f"{model} on {machine.name}, per device: {machine.said}",
        caption=f"{SAID_BY} Not in them: {'; '.join(unknown(machine))}.",
        caption_justify="left",
        box=SIMPLE,
    )
    drawn.add_column("scheme", no_wrap=True)
    for _, header, _ in COLUMNS:
        drawn.add_column(header, justify="right", no_wrap=True)
    for record in records:
        style = None if record.metrics["fits"] == "yes" else "red"
        drawn.add_row(record.label, *(_cell(record, *c) for c in COLUMNS), style=style)
    return drawn


def _cell(record: Record, metric: str, _: str, form: str) -> str:
    value = record.metrics.get(metric)
    return "-" if value is None else form.format(value)


def uncounted(records: Sequence[Record]) -> list[str]:
    """Operations whose work is not in the counts, one sentence for each program."""
    found = []
    for record in records:
        for step, program in record.metrics["programs"].items():
            names = ", ".join(
                f"{k} ({n})" for k, n in program.get("uncounted", {}).items()
            )
            if names:
                found.append(f"{record.label}, {step}: counted once or not: {names}")
    return found


def failures(records: Sequence[Record]) -> list[str]:
    """Why programs could not be compiled, one sentence each."""
    return [
        f"{record.label}, {step}: failed: {program['error']}"
        for record in records
        for step, program in record.metrics["programs"].items()
        if "error" in program
    ]


def refusals(records: Sequence[Record]) -> list[str]:
    """Why programs do not fit or could not be compiled, one sentence each."""
    found = failures(records)
    for record in records:
        for step, program in record.metrics["programs"].items():
            why = program.get("refusal")
            if "error" not in program and not why and not program["fits"]:
                why = (
                    f"needs {program['needed_bytes'] / GIB:.2f} GiB, a device has "
                    f"{program['available_bytes'] / GIB:.2f}"
                )
            if why:
                found.append(f"{record.label}, {step}: does not fit: {why}")
    return found
