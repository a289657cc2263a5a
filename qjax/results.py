"""Results as JSON lines, one record a run, and the table that shows them.

A record says what was run (configuration with class names), on what (text hash,
model, device, versions, commit) and what came out (metrics).
"""

import json
import os
import platform
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.table import Table

from qjax.io.jsontext import parse_json

PACKAGES = ("qjax", "jax", "jaxlib", "flax", "numpy", "ml_dtypes", "transformers")


@dataclass(frozen=True)
class Record:
    """One run.

    `label` names it in tables; `series` is the curve it belongs to in a picture
    (None: a point of its own); `config`, `metrics` and `context` are JSON values.
    """

    label: str
    config: Any
    metrics: Mapping[str, Any]
    context: Mapping[str, Any] = field(default_factory=dict)
    series: str | None = None


def environment() -> dict[str, Any]:
    """Versions, device, date (UTC) and, in a git checkout, the commit."""
    device = jax.devices()[0]
    return {
        "versions": {"python": platform.python_version(), **_versions()},
        "device": f"{device.platform}: {device.device_kind}",
        "devices": jax.device_count(),
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "commit": git_commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


# What a run writes itself, which changes nothing of how it came about.
OUTPUTS = (":(top,exclude,glob)**/results/**", ":(top,exclude,glob)**/README.md")


def git_commit() -> str | None:
    """Commit of this source, with "-dirty" if files differ; None outside git.

    Files in folders called `results`, and the READMEs rendered from them, do not count.
    """
    here = Path(__file__)

    def git(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["git", "-C", str(here.parent), *command], capture_output=True, text=True
        )

    try:
        # An installed copy may lie inside some other project's repository.
        if git("ls-files", "--error-unmatch", here.name).returncode:
            return None
        commit = git("rev-parse", "HEAD")
        changed = ("status", "--porcelain", "--untracked-files=no", "--", ":/")
        dirty = git(*changed, *OUTPUTS).stdout
    except FileNotFoundError:
        return None
    if commit.returncode:
        return None
    return commit.stdout.strip() + ("-dirty" if dirty else "")


def append(path: str | Path, record: Record) -> None:
    """Add one line to a JSON-lines file, making its folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(_finite(asdict(record)), allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    """JSON has no NaN or infinity: they become null."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value


def read(path: str | Path) -> list[Record]:
    """The records of a JSON-lines file.

    Raises FileNotFoundError, or ValueError naming the line that is no record.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"results file {str(path)!r} does not exist")
    records = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        where = f"line {number} of {str(path)!r}"
        records.append(_record(where, parse_json(line, where)))
    return records


def _record(where: str, found: Any) -> Record:
    """The record of a line, each field of its type."""
    kinds = {"label": str, "config": object, "metrics": dict, "context": dict}
    kinds["series"] = str | None
    if not isinstance(found, dict) or not {"label", "config", "metrics"} <= set(found):
        raise ValueError(f"{where} is not a record: it lacks label, config or metrics")
    for name, value in found.items():
        if name not in kinds or not isinstance(value, kinds[name]):
            raise ValueError(f"{where} is not a record: {name} is {value!r}")
    return Record(**found)


def pareto(points: Sequence[tuple[int | float, int | float]]) -> list[int]:
    """Indices of the points that no other beats in both coordinates, by the first.

    Smaller is better. A point is beaten by one that is no worse in both and better
    in one; points with a non-finite coordinate never count.

    >>> pareto([(4, 10), (2, 30), (3, 40), (4, 9)])
    [1, 3]
    """
    finite = [i for i, point in enumerate(points) if np.isfinite(point).all()]

    def beaten(i: int) -> bool:
        (x, y) = points[i]
        return any(
            a <= x and b <= y and (a, b) != (x, y)
            for a, b in (points[j] for j in finite)
        )

    return sorted((i for i in finite if not beaten(i)), key=lambda i: points[i])


@dataclass(frozen=True)
class Column:
    """A column of a table: metric, header (with unit) and how to write a value."""

    metric: str
    header: str
    write: Callable[[int | float], str]


def megabytes(count: int | float) -> str:
    """Bytes as MB (10^6)."""
    return f"{count / 1e6:,.1f}"


COLUMNS = (
    Column("bits_per_weight", "bits per\nweight", "{:.3f}".format),
    Column("disk_bytes", "disk\nbytes", "{:,.0f}".format),
    Column("perplexity", "perplexity", "{:.3f}".format),
    Column("kl", "KL\nnats", "{:.5f}".format),
    Column("top1_agreement", "top-1\nagree", "{:.1%}".format),
    Column("quantize_seconds", "quantize\ns", "{:.2f}".format),
    Column("quantize_peak_bytes", "quantize\npeak MB", megabytes),
    Column("run_peak_bytes", "run\npeak MB", megabytes),
    Column("tokens_per_second", "tokens\nper s", "{:,.0f}".format),
)


def front(records: Sequence[Record], x: str, y: str) -> list[int]:
    """Indices of the records on the Pareto front of two metrics, smaller better."""
    nan = float("nan")

    def value(record: Record, metric: str) -> float:
        found = record.metrics.get(metric)
        return nan if found is None else float(found)

    return pareto([(value(r, x), value(r, y)) for r in records])


def table(
    records: Sequence[Record],
    title: str,
    caption: str | None = None,
    columns: Iterable[Column] = COLUMNS,
) -> Table:
    """A rich table of records; `*` marks the bits-perplexity Pareto front."""
    best = set(front(records, "bits_per_weight", "perplexity"))
    columns = tuple(columns)
    drawn = Table(title=title, caption=caption, caption_justify="left")
    drawn.add_column("recipe", no_wrap=True)
    for column in columns:
        drawn.add_column(column.header, justify="right", no_wrap=True)
    for i, record in enumerate(records):
        cells = [_cell(column, record) for column in columns]
        style = "bold" if i in best else None
        drawn.add_row(record.label + (" *" if i in best else ""), *cells, style=style)
    return drawn


def _cell(column: Column, record: Record) -> str:
    value = record.metrics.get(column.metric)
    return "-" if value is None else column.write(value)
