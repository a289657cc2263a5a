"""Put qjax's rows and auto-round's side by side: means over the seeds.

Command: python experiments/papers/autoround/beside.py
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from qjax.results import Record, append

RESULTS = Path(__file__).parent / "results"
TEXTS = ("pydoc", "wikitext2")


def rows_of(name: str) -> list[dict[str, Any]]:
    """The rows of a file; none if it is missing."""
    path = RESULTS / name
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def chosen(rows: list[dict[str, Any]], **config: Any) -> list[dict[str, Any]]:
    """The metrics of the rows with this configuration."""
    return [r["metrics"] for r in rows if config.items() <= r["config"].items()]


def beside(format: str, ours: list[Any], peer: list[Any]) -> Record:
    """One line of the tables."""
    sides = {
        "qjax": chosen(ours, method="autoround", format=format),
        "peer": chosen(peer, format=format),
        "gptq": chosen(ours, method="gptq", format=format),
        "rtn": chosen(ours, method="rtn", format=format),
    }
    found: dict[str, Any] = {}
    for side, runs in sides.items():
        for text in TEXTS if runs else ():
            for name, short in (("perplexity_", ""), ("kl_", "kl_")):
                mean = float(np.mean([run[f"{name}{text}"] for run in runs]))
                found[f"{text}_{short}{side}"] = mean
        if runs:
            cold = [run["seconds"] for run in runs if "seconds" in run]
            found[f"seconds_{side}"] = min(cold)
            found[f"peak_mb_{side}"] = max(r["peak_rss"] for r in runs) / 1e6
            found[f"runs_{side}"] = len(runs)
    for text in TEXTS:
        pair = [
            np.array([run[f"perplexity_{text}"] for run in sides[side]])
            for side in ("qjax", "peer")
        ]
        if all(len(values) for values in pair):
            a, b = pair
            found[f"{text}_excess"] = 100 * (a.mean() / b.mean() - 1)
        if all(len(values) > 1 for values in pair):
            spread = math.hypot(*(v.std(ddof=1) / len(v) ** 0.5 for v in pair))
            found[f"{text}_excess_error"] = 100 * spread / pair[1].mean()
    contexts = [row["context"] for row in (*peer, *ours)]
    versions: dict[str, str] = {}
    for context in contexts:
        versions |= context["versions"]
    last = max(context["date"] for context in contexts)
    return Record(
        f"tiny_llama {format}", {"format": format}, found,
        {"versions": versions, "date": last},
    )  # fmt: skip


def main() -> None:
    """Write `results/beside.jsonl`."""
    ours, peer = rows_of("qjax.jsonl"), rows_of("peer.jsonl")
    formats = dict.fromkeys(row["config"]["format"] for row in (*ours, *peer))
    partial = RESULTS / ".beside.jsonl.part"
    partial.unlink(missing_ok=True)
    for format in formats:
        append(partial, beside(format, ours, peer))
    partial.replace(RESULTS / "beside.jsonl")


if __name__ == "__main__":
    main()
