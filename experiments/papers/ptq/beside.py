"""Both sides of the comparison in one table: `results/beside.jsonl`.

    python experiments/papers/ptq/beside.py
    python scripts/render_tables.py

Reads what `run.py` and `peer.py` wrote, what they wrote with other batches into
`*_more.jsonl`, and of a random 1B Llama into `*_1b.jsonl`. Perplexity and KL divergence
are means over all runs of a method; `excess` is qjax's perplexity over the peer's, less
1, in percent, and `excess_error` the standard error of it. Seconds and memory are those
of the first batching.
Exits with 1 if a method of `HELD` is more than 0.5 % above the peer on a text.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from qjax.results import Record, append

RESULTS = Path(__file__).parent / "results"
TEXTS = ("pydoc", "wikitext2")
HELD = (
    "rtn-w4a16",
    "rtn-w3a16",
    "gptq-w4a16",
    "gptq-w3a16",
    "awq-w4a16-asym",
    "smoothquant-gptq-w8a8",
)
LIMIT = 0.5
TIMED = ("tiny_llama", "tiny_llama_outliers", "random_1b")
Key = tuple[str, str]


def rows(name: str) -> dict[Key, dict[str, Any]]:
    """Rows by model and method; none if there is no such file."""
    path = RESULTS / name
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    found = [json.loads(line) for line in lines]
    return {(row["context"]["model"], row["config"]["method"]): row for row in found}


def runs(side: str, key: Key, name: str) -> np.ndarray:
    """A measure of every run of one side."""
    held = (rows(f"{side}.jsonl"), rows(f"{side}_more.jsonl"))
    values = [row[key]["metrics"][f"{name}_runs"] for row in held if key in row]
    return np.concatenate(values)


def error(values: np.ndarray) -> float:
    """Standard error of the mean, in percent of it; 0 for a single run."""
    if len(values) == 1:
        return 0.0
    return 100 * values.std(ddof=1) / len(values) ** 0.5 / values.mean()


def evaluated(row: dict[str, Any]) -> list[str]:
    """The texts on which a row was evaluated."""
    return [text for text in TEXTS if f"perplexity_{text}" in row["metrics"]]


def beside(key: Key, ours: Any, theirs: Any) -> Record:
    """One row of the table."""
    metrics: dict[str, Any] = {}
    for text in evaluated(theirs):
        a, b = (runs(side, key, f"perplexity_{text}") for side in ("qjax", "peer"))
        metrics |= {
            "runs_qjax": len(a),
            "runs_peer": len(b),
            f"{text}_qjax": a.mean(),
            f"{text}_peer": b.mean(),
            f"{text}_excess": 100 * (a.mean() / b.mean() - 1),
            f"{text}_excess_error": (error(a) ** 2 + error(b) ** 2) ** 0.5,
        }
        for side in ("qjax", "peer"):
            metrics[f"{text}_kl_{side}"] = runs(side, key, f"kl_{text}").mean()
    if key[0] in TIMED:
        for side, found in (("qjax", ours["metrics"]), ("peer", theirs["metrics"])):
            metrics[f"cold_{side}"] = found["cold_seconds"]
            if "warm_seconds" in found:
                metrics[f"warm_{side}"] = found["warm_seconds"]
            metrics[f"peak_mb_{side}"] = found["peak_rss"] / 1e6
    versions = ours["context"]["versions"] | theirs["context"].get("versions", {})
    context = {"versions": versions, "date": ours["context"]["date"]}
    return Record(" ".join(key), {"method": key[1]}, metrics, context)


def main() -> str | None:
    """Write the rows; the return value is the complaint."""
    ours, theirs = (
        rows(f"{n}.jsonl") | rows(f"{n}_1b.jsonl") for n in ("qjax", "peer")
    )
    path = RESULTS / "beside.jsonl"
    partial = path.with_name(".beside.jsonl.part")
    partial.unlink(missing_ok=True)
    above = []
    for key in theirs:
        if key not in ours:
            continue
        record = beside(key, ours[key], theirs[key])
        append(partial, record)
        for text in evaluated(theirs[key]):
            excess = record.metrics[f"{text}_excess"]
            if key[1] in HELD and excess > LIMIT:
                above.append(f"{record.label} {text} {excess:+.2f} %")
    partial.replace(path)
    return f"above the peer: {', '.join(above)}" if above else None


if __name__ == "__main__":
    sys.exit(main())
