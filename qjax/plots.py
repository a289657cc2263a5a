"""Pictures of results: one style, no display needed."""

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator
from matplotlib.transforms import Bbox

from qjax.report import SiteReport
from qjax.results import Record, front

Point = tuple[int | float, int | float]
INK, QUIET, GRID, FRONT = "#22262b", "#6c747d", "#eceef0", "#f3c969"
COLOURS = ("#2f6fb2", "#d9622b", "#8a4fa3", "#b08a12")
SINGLE = "#2e8f6b"
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": QUIET,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11.5,
    "axes.titlelocation": "left",
    "axes.titlepad": 12,
    "axes.grid": True,
    "axes.axisbelow": True,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "grid.color": GRID,
    "legend.frameon": False,
    "savefig.dpi": 160,
}
BITS = (1, 2, 3, 4, 5, 6, 8, 12, 16, 32)
# Where a label may stand around its point: near places first.
PLACES = tuple(
    (distance * math.cos(angle), distance * math.sin(angle))
    for distance in (11, 18, 26, 36, 48, 62, 80, 100)
    for angle in np.deg2rad((35, -35, 90, -90, 145, -145, 0, 180, 62, -62, 118, -118))
)


def compare_plot(
    path: str | Path, records: Sequence[Record], title: str, subtitle: str = ""
) -> None:
    """Write a PNG: perplexity and KL divergence against bits per weight.

    The first record is the reference, whose perplexity is drawn as a line. Records
    of one `series` are joined; the Pareto front is underlaid and its points named.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12.6, 6.2))
        left, right = figure.subplots(1, 2)
        figure.subplots_adjust(0.05, 0.165, 0.985, 0.815, wspace=0.13)
        figure.text(0.05, 0.948, title, fontsize=15, fontweight="bold")
        figure.text(0.05, 0.905, subtitle, fontsize=10, color=QUIET)
        _panel(left, records, "perplexity", "perplexity (lower is better)")
        _panel(right, records, "kl", "KL divergence to full precision, nats")
        _reference(left, records[0])
        figure.legend(
            handles=_legend(records),
            loc="lower center",
            ncols=8,
            bbox_to_anchor=(0.5, 0.008),
            handletextpad=0.5,
            columnspacing=1.8,
        )
        for axes, metric in ((left, "perplexity"), (right, "kl")):
            _name_points(axes, records, metric)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)


def _panel(axes: Axes, records: Sequence[Record], metric: str, title: str) -> None:
    drawn = _drawable(records, metric)
    for record in drawn:
        axes.plot(*_point(record, metric), **_marker(record, records), zorder=4)
    for name in _series(drawn):
        line = sorted(_point(r, metric) for r in drawn if r.series == name)
        colour, style = _line_style(name, records)
        axes.plot(*zip(*line), color=colour, ls=style, lw=1.3, alpha=0.75, zorder=3)
    best = [_point(drawn[i], metric) for i in front(drawn, "bits_per_weight", metric)]
    if best:
        axes.plot(*zip(*best), color=FRONT, lw=9, alpha=0.45, zorder=1, **_ROUND)
        axes.plot(*zip(*best), "o", ms=14, mfc="none", mec=FRONT, mew=2, zorder=2)
    axes.set_title(title)
    _scales(axes, [_point(record, metric) for record in drawn])


_ROUND: dict[str, Any] = {"solid_capstyle": "round", "solid_joinstyle": "round"}


def _scales(axes: Axes, points: Sequence[Point]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("bits per weight, all overhead counted")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_locator(FixedLocator(BITS))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    if not points:
        return
    xs, ys = zip(*points)
    axes.set_xlim(min(xs) / 1.22, max(xs) * 1.3)
    room = (max(ys) / min(ys)) ** 0.1
    low, high = min(ys) / max(room, 1.002), max(ys) * max(room, 1.002)
    axes.set_ylim(low, high)
    if high / low < 30:
        axes.yaxis.set_major_locator(FixedLocator(_round_numbers(low, high)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_minor_locator(NullLocator())


def _round_numbers(
    low: int | float, high: int | float, most: int = 8
) -> list[int | float]:
    """Round numbers within a range, about evenly spaced on a log axis."""
    unit = 10 ** math.floor(math.log10(high - low) - 1)
    for step in (unit * m for m in (1, 2, 5, 10, 20, 50, 100)):
        ticks = [step * i for i in range(math.ceil(low / step), int(high / step) + 1)]
        # On a log axis the lowest gap is the widest: thin the crowded upper end.
        kept = ticks[:1]
        gap = math.log(high / low) / most
        for tick in ticks[1:]:
            if math.log(tick / kept[-1]) >= gap:
                kept.append(tick)
        if len(ticks) <= 4 * most:
            return kept
    return [low, high]


def _reference(axes: Axes, record: Record) -> None:
    level = record.metrics["perplexity"]
    axes.axhline(level, color=INK, lw=1, ls=(0, (4, 3)), alpha=0.7, zorder=2)


def _name_points(axes: Axes, records: Sequence[Record], metric: str) -> None:
    """Name the single points and the front's, clear of points, labels and lines."""
    drawn = _drawable(records, metric)
    best = set(front(drawn, "bits_per_weight", metric))
    points = [axes.transData.transform(_point(r, metric)) for r in drawn]
    taken = [_around(point, 9) for point in points]
    drawn_lines = [_pixels_along(axes, line) for line in axes.get_lines()]
    lines = np.concatenate([np.zeros((0, 2)), *drawn_lines])
    named = [r for i, r in enumerate(drawn) if i in best or r.series is None]
    for record in sorted(named, key=lambda r: _point(r, metric)):
        point = _point(record, metric)
        box = _label(axes, record.label, point, taken, lines)
        leader = np.linspace(axes.transData.transform(point), _middle(box), 40)
        taken.append(box)
        lines = np.concatenate([lines, leader])


def _pixels_along(axes: Axes, line: Line2D) -> np.ndarray:
    """Points every few pixels along a drawn line."""
    ends = line.get_transform().transform(np.asarray(line.get_xydata(), float))
    if len(ends) < 2 or line.get_linestyle() == "None":
        return ends
    steps = np.linspace(0, 1, 120)[:, None]
    return np.concatenate([a + (b - a) * steps for a, b in pairwise(ends)])


def _label(
    axes: Axes,
    label: str,
    point: Point,
    taken: Sequence[Bbox],
    lines: np.ndarray,
) -> Bbox:
    """Write a label at the freest near place; returns the box it fills."""
    text = axes.annotate(
        label,
        point,
        xytext=PLACES[0],
        textcoords="offset points",
        fontsize=8.5,
        ha="center",
        va="center",
        zorder=6,
        path_effects=[withStroke(linewidth=2.5, foreground="white")],
        arrowprops={"arrowstyle": "-", "color": QUIET, "lw": 0.7, "shrinkB": 6},
    )
    x, y = axes.transData.transform(point)
    scale = axes.figure.dpi / 72
    width, height = text.get_window_extent().size
    frame = axes.get_window_extent()
    others = [other for other in taken if not other.contains(x, y)]

    def box(place: Point) -> Bbox:
        # The nearer edge of the text, not its middle, keeps the distance.
        away = math.copysign(width / 2, place[0]) * (abs(place[0]) > 1)
        cx, cy = x + place[0] * scale + away, y + place[1] * scale
        return Bbox.from_bounds(cx - width / 2, cy - height / 2, width, height)

    def cost(place: Point) -> int | float:
        here = box(place)
        outside = here.x0 < frame.x0 or here.x1 > frame.x1
        outside |= here.y0 < frame.y0 or here.y1 > frame.y1
        hidden = sum(here.padded(2).overlaps(other) for other in taken)
        leader = np.linspace((x, y), _middle(here), 40)
        hidden += sum(other.count_contains(leader) > 0 for other in others)
        crossed = here.padded(1).count_contains(lines) > 0
        return 20 * outside + 10 * hidden + 3 * crossed + math.hypot(*place) / 15

    chosen = box(min(PLACES, key=cost))
    text.set_position(tuple((_middle(chosen) - (x, y)) / scale))
    return chosen


def _middle(box: Bbox) -> np.ndarray:
    return (np.asarray(box.p0) + np.asarray(box.p1)) / 2


def error_plot(path: str | Path, sites: Sequence[SiteReport]) -> None:
    """Write a PNG: error of every site's output by layer, as solved and as rounded.

    Sites of one name in all layers make a line; the dashed line of the same colour is
    rounding to nearest.

    Raises:
        ValueError: there are no sites.
    """
    if not sites:
        raise ValueError("error_plot needs the report of at least one site")
    series: dict[str, list[tuple[int, SiteReport]]] = {}
    for site in sites:
        parts = site.name.split("/")
        layer = next((int(p) for p in parts if p.isdigit()), 0)
        kept = [p for p in parts if not p.isdigit() and p not in ("layers", "kernel")]
        series.setdefault("/".join(kept), []).append((layer, site))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8, 4.6), layout="constrained")
        axes = figure.subplots()
        colours = matplotlib.colormaps["tab10"].colors  # pyright: ignore
        for i, (name, rows) in enumerate(series.items()):
            colour, layers = colours[i % len(colours)], [layer for layer, _ in rows]
            solved = [max(site.error, 1e-9) for _, site in rows]
            rounded = [max(site.error_before, 1e-9) for _, site in rows]
            axes.plot(layers, rounded, "--", color=colour, lw=1, alpha=0.6)
            axes.plot(layers, solved, "-o", color=colour, ms=3.5, lw=1.5, label=name)
        axes.set_yscale("log")
        axes.set_xlabel("layer")
        axes.set_ylabel("relative error of the output")
        methods = ", ".join(dict.fromkeys(site.method for site in sites))
        axes.set_title(f"{methods} (solid) and round to nearest (dashed)")
        figure.legend(loc="outside right center", fontsize=8)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)


def loss_plot(path: str | Path, lines: Sequence[dict[str, Any]], title: str) -> None:
    """Write a PNG: the loss of every step, and the held-out loss where it was taken.

    Args:
      path: the picture.
      lines: of a job's `metrics.jsonl`.
      title: what was trained.
    """
    trained = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    held = [
        (line["step"], line["held_out_loss"])
        for line in lines
        if "held_out_loss" in line
    ]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8, 4.6), layout="constrained")
        axes = figure.subplots()
        if trained:
            axes.plot(
                *zip(*trained), color=COLOURS[0], lw=1, alpha=0.6, label="training"
            )
        if held:
            axes.plot(*zip(*held), "-o", color=COLOURS[1], ms=4, label="held out")
        axes.set_xlabel("step")
        axes.set_ylabel("loss (nats per token)")
        axes.set_title(title)
        axes.legend()
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)


def _around(centre: Any, radius: int | float) -> Bbox:
    x, y = centre
    return Bbox.from_extents(x - radius, y - radius, x + radius, y + radius)


def _drawable(records: Sequence[Record], metric: str) -> list[Record]:
    """Records with a positive value: both axes are logarithmic."""

    def positive(record: Record, key: str) -> bool:
        value = record.metrics.get(key)
        return value is not None and math.isfinite(value) and value > 0

    return [
        r for r in records if positive(r, metric) and positive(r, "bits_per_weight")
    ]


def _point(record: Record, metric: str) -> Point:
    return record.metrics["bits_per_weight"], record.metrics[metric]


def _series(records: Sequence[Record]) -> list[str]:
    return list(dict.fromkeys(r.series for r in records if r.series is not None))


def _line_style(series: str, records: Sequence[Record]) -> tuple[str, Any]:
    """Colour by method (the first word), dashes by the rest (group size)."""
    names = _series(records)
    methods = list(dict.fromkeys(name.split()[0] for name in names))
    method = series.split()[0]
    siblings = [name for name in names if name.split()[0] == method]
    colour = COLOURS[methods.index(method) % len(COLOURS)]
    return colour, ("-", (0, (3, 2)), ":")[min(siblings.index(series), 2)]


def _marker(record: Record, records: Sequence[Record]) -> dict[str, Any]:
    if record.series is None:
        colour = (
            INK if record is records[0] and not record.metrics.get("kl") else SINGLE
        )
        return {"marker": "D", "ms": 6, "color": colour, "ls": "", "mec": "white"}
    colour, style = _line_style(record.series, records)
    face = colour if style == "-" else "white"
    return {"marker": "o", "ms": 6.5, "mec": colour, "mfc": face, "mew": 1.4, "ls": ""}


def _legend(records: Sequence[Record]) -> list[Line2D]:
    handles = []
    for name in _series(records):
        colour, style = _line_style(name, records)
        face = colour if style == "-" else "white"
        handles.append(
            Line2D([], [], color=colour, ls=style, marker="o", mfc=face, label=name)
        )
    if any(r.series is None for r in records[1:]):
        handles.append(
            Line2D([], [], ls="", marker="D", color=SINGLE, label="one format each")
        )
    handles.append(
        Line2D([], [], ls=(0, (4, 3)), color=INK, lw=1, label="full precision")
    )
    handles.append(Line2D([], [], color=FRONT, lw=7, alpha=0.6, label="Pareto front"))
    return handles
