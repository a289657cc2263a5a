"""Both sides of the comparison in one table: `results/beside.jsonl`.

    python experiments/papers/ptq/beside.py
    python scripts/render_tables.py

Reads what `run.py` and `peer.py` wrote. `excess` is qjax's perplexity over the peer's,
less 1, in percent; `error_ratio` the median over the layers of qjax's error at the
output of a layer over the peer's, where both were recorded. Exits with 1 if a method of
`HELD` is more than 0.5 % above the peer on a text.
"""

import json
import sys
from pathlib import Path
from typing import Any

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


def rows(name: str) -> dict[tuple[str, str], dict[str, Any]]:
    """Rows by model and method."""
    lines = (RESULTS / name).read_text(encoding="utf-8").splitlines()
    found = [json.loads(line) for line in lines]
    return {(row["context"]["model"], row["config"]["method"]): row for row in found}


def beside(model: str, method: str, ours: Any, theirs: Any) -> Record:
    """One row of the table."""
    mine, other = ours["metrics"], theirs["metrics"]
    metrics: dict[str, Any] = {}
    for text in TEXTS:
        a, b = mine[f"perplexity_{text}"], other[f"perplexity_{text}"]
        metrics[f"{text}_qjax"], metrics[f"{text}_peer"] = a, b
        metrics[f"{text}_excess"] = 100 * (a / b - 1)
    for name, key in (("cold", "cold_seconds"), ("warm", "warm_seconds")):
        for side, found in (("qjax", mine), ("peer", other)):
            if key in found:
                metrics[f"{name}_{side}"] = found[key]
    for side, found in (("qjax", mine), ("peer", other)):
        if "peak_rss" in found:
            metrics[f"peak_mb_{side}"] = found["peak_rss"] / 1e6
    versions = ours["context"]["versions"] | theirs["context"].get("versions", {})
    context = {"versions": versions, "date": ours["context"]["date"]}
    return Record(f"{model} {method}", {"method": method}, metrics, context)


def main() -> str | None:
    """Write the rows; the return value is the complaint."""
    ours, theirs = rows("qjax.jsonl"), rows("peer.jsonl")
    path = RESULTS / "beside.jsonl"
    partial = path.with_name(".beside.jsonl.part")
    partial.unlink(missing_ok=True)
    above = []
    for key in theirs:
        if key not in ours:
            continue
        record = beside(*key, ours[key], theirs[key])
        append(partial, record)
        for text in TEXTS:
            excess = record.metrics[f"{text}_excess"]
            if key[1] in HELD and excess > LIMIT:
                above.append(f"{record.label} {text} {excess:+.2f} %")
    partial.replace(path)
    return f"above the peer: {', '.join(above)}" if above else None


if __name__ == "__main__":
    sys.exit(main())
