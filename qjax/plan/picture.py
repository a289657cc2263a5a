"""Memory and least time of a decode step against batch, context and scheme."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from qjax.plan.machines import Machine
from qjax.plan.report import GIB
from qjax.plots import COLOURS, INK, QUIET, SINGLE, STYLE
from qjax.results import Record

PARTS = (("weights_GiB", 1.0), ("cache_GiB", 0.6), ("temporaries_GiB", 0.3))
SHADES = (*COLOURS, SINGLE)
COUNTED = (
    "memory: the compiler's, weights and cache included; x: does not fit.  {} "
    "bytes and operations\ncounted from the jaxpr, at the chip's peak rates{};  {} "
    "with the bytes that the compiled program moves"
)
LINES = COUNTED.format(
    "solid:", " (circle: memory limits, square: matrix units)", "dotted:"
)
BARS = COUNTED.format("dark:", "", "light:")


def plan_plot(
    path: str | Path, records: Sequence[Record], machine: Machine, model: str
) -> None:
    """Write a PNG: memory on the left, time of a decode step on the right.

    There is a row for each of batch and context that takes several values, the other at
    its first; with neither, bars of every scheme. Solid lines are the limit, dotted
    ones the compiled program; a square is a step that the matrix units limit, a cross
    a program that does not fit.
    """
    sweeps = [name for name in ("batch", "context") if len(_values(records, name)) > 1]
    rows = sweeps or ["scheme"]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 0.8 + 3.5 * len(rows)), layout="constrained")
        figure.suptitle(f"{model} on {machine.name}, per device", fontweight="bold")
        grid = figure.subplots(len(rows), 2, squeeze=False)
        for (left, right), name in zip(grid, rows):
            draw = _bars if name == "scheme" else _lines
            draw(left, right, _fixed(records, name), name)
            capacity = machine.chip.memory / GIB
            left.axhline(capacity, color=INK, lw=1, ls=(0, (4, 3)))
            left.set_ylim(0, 1.08 * max(capacity, left.dataLim.y1))
            left.annotate(
                f"{machine.chip.name}: {capacity:.1f} GiB",
                (0.02, capacity),
                xycoords=("axes fraction", "data"),
                xytext=(0, 4),
                textcoords="offset points",
                fontsize=8.5,
                color=QUIET,
            )
            left.set_title("memory, GiB")
            right.set_title("decode step, ms: limit, and as compiled")
        figure.supxlabel(LINES if sweeps else BARS, fontsize=8.5, color=QUIET)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)


def _values(records: Sequence[Record], name: str) -> list[Any]:
    return list(dict.fromkeys(record.config[name] for record in records))


def _fixed(records: Sequence[Record], name: str) -> list[Record]:
    """The records in which all but one of batch and context have their first value."""
    found = list(records)
    for other in {"batch", "context"} - {name}:
        first = _values(records, other)[0]
        found = [r for r in found if r.config[other] == first]
    return found


def _lines(left: Axes, right: Axes, records: Sequence[Record], name: str) -> None:
    for i, scheme in enumerate(_values(records, "scheme")):
        own = sorted(
            (r for r in records if r.config["scheme"] == scheme),
            key=lambda r: r.config[name],
        )
        colour = SHADES[i % len(SHADES)]
        for axes, metric, style in (
            (left, "memory_GiB", "-"),
            (right, "decode_limit_ms", "-"),
            (right, "decode_compiled_ms", ":"),
        ):
            line = [(r.config[name], r.metrics.get(metric)) for r in own]
            line = [(x, y) for x, y in line if y is not None]
            if line:
                label = scheme if style == "-" else None
                axes.plot(*zip(*line), style, color=colour, lw=1.6, label=label)
        for record in own:
            here, size = record.config[name], record.metrics.get("memory_GiB")
            if size is not None:
                fits = record.metrics["fits"] == "yes"
                left.plot(here, size, "o" if fits else "x", color=colour)
            limit = record.metrics.get("decode_limit_ms")
            if limit is not None:
                parts = (record.metrics[f"decode_{p}_ms"] for p in ("memory", "matrix"))
                memory, matrix = parts
                marker = "o" if memory >= matrix else "s"
                right.plot(here, limit, marker, color=colour, ms=4)
    ticks = _values(records, name)
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(ticks))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
        axes.set_xlabel(
            {"batch": "sequences", "context": "tokens of room in each sequence"}[name]
        )
        axes.set_ylim(bottom=0)
    right.legend(fontsize=8.5)


def _bars(left: Axes, right: Axes, records: Sequence[Record], _: str) -> None:
    names = [record.config["scheme"] for record in records]
    for i, record in enumerate(records):
        colour, below = SHADES[i % len(SHADES)], 0.0
        for metric, alpha in PARTS:
            size = record.metrics.get(metric) or 0.0
            left.bar(i, size, 0.6, below, color=colour, alpha=alpha)
            below += size
        whole = record.metrics.get("memory_GiB")
        if whole is not None and record.metrics["fits"] != "yes":
            left.plot(i, whole, "x", color=colour)
        for shift, metric, alpha in (
            (-0.18, "decode_limit_ms", 1.0),
            (0.18, "decode_compiled_ms", 0.45),
        ):
            height = record.metrics.get(metric) or 0.0
            right.bar(i + shift, height, 0.34, color=colour, alpha=alpha)
    for axes in (left, right):
        axes.set_xticks(range(len(names)), names)
        axes.grid(axis="x", visible=False)
    left.set_xlabel("dark to light: weights, cache, temporaries")
