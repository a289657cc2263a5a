"""Write the tables of the READMEs from committed results; `--check` fails on drift.

A table stands between two comments, and only these words are typed by hand:

    <!-- table: results/tiny.jsonl bits_per_weight perplexity -->
    <!-- end -->

The path is relative to the README; the metrics are the columns, all known ones if
none is named.
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from qjax.results import COLUMNS, Column, Record, front, read

ROOT = Path(__file__).parents[1]
MARKER = re.compile(
    r"^(?P<begin><!-- table: (?P<file>\S+)(?P<metrics>[^>]*?) *-->\n)"
    r".*?^(?P<end><!-- end -->)$",
    re.DOTALL | re.MULTILINE,
)
KNOWN = {column.metric: column for column in COLUMNS}


def column(metric: str) -> Column:
    """How to head and write a metric; an unknown one gets 4 digits."""
    plain = Column(metric, metric.replace("_", " "), "{:.4g}".format)
    return KNOWN.get(metric, plain)


def render(records: Sequence[Record], columns: Sequence[Column]) -> str:
    """A Markdown table; bold rows are on the front of bits against perplexity."""
    best = set(front(records, "bits_per_weight", "perplexity"))
    heads = ["", *(each.header.replace("\n", " ") for each in columns)]
    rows = [heads, ["---", *("---:" for _ in columns)]]
    for i, record in enumerate(records):
        label = f"**{record.label}**" if i in best else record.label
        rows.append([label, *(cell(record, each) for each in columns)])
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([*lines, "", *source(records[0])]) + "\n"


def cell(record: Record, column: Column) -> str:
    """One value, or a dash where the run has none; words as they are."""
    value = record.metrics.get(column.metric)
    if isinstance(value, str):
        return value
    return "–" if value is None else column.write(value)


def source(record: Record) -> list[str]:
    """What was run on what, as far as the record says."""
    context = record.context
    parts = []
    if model := context.get("model"):
        parts.append(f"model {model['name']}, {model['weights'] / 1e6:.1f}M parameters")
    if text := context.get("text"):
        parts.append(f"text {text['name']} (sha256 {text['sha256'][:8]})")
    if "scored_tokens" in context:
        parts.append(f"{context['scored_tokens']:,} tokens scored")
    if "device" in context:
        parts.append(f"{context['device']}, {context.get('cores', '?')} cores")
    if jax := context.get("versions", {}).get("jax"):
        parts.append(f"JAX {jax}")
    if commit := context.get("commit"):
        commit, dash, state = commit.partition("-")
        parts.append(f"commit {commit[:10]}{dash}{state}")
    if date := context.get("date"):
        parts.append(date[:10])
    return ["; ".join(parts) + "."] if parts else []


def rendered(page: Path) -> str:
    """The page with its tables as the results say."""

    def table(match: re.Match[str]) -> str:
        records = read(page.parent / match["file"])
        if not records:
            raise ValueError(f"{page.parent / match['file']} holds no record")
        columns = [column(metric) for metric in match["metrics"].split()] or COLUMNS
        return f"{match['begin']}{render(records, columns)}{match['end']}"

    return MARKER.sub(table, page.read_text(encoding="utf-8"))


def pages() -> list[Path]:
    """Every Markdown file of the project."""

    def ours(path: Path) -> bool:
        first = path.relative_to(ROOT).parts[0]
        return not first.startswith(".") and first not in {"runs", "results"}

    return sorted(path for path in ROOT.rglob("*.md") if ours(path))


def main(arguments: Sequence[str]) -> str | None:
    """Render every page, or only compare; the return value is the complaint."""
    if list(arguments) not in ([], ["--check"]):
        return f"usage: {Path(__file__).name} [--check]"
    stale = []
    for page in pages():
        try:
            text = rendered(page)
        except (FileNotFoundError, ValueError) as error:
            return f"{page.relative_to(ROOT)}: {error}"
        if text != page.read_text(encoding="utf-8"):
            stale.append(page)
    if arguments:
        names = ", ".join(str(page.relative_to(ROOT)) for page in stale)
        return f"tables differ from their results: {names}" if stale else None
    for page in stale:
        page.write_text(rendered(page), encoding="utf-8")
        print(f"wrote {page.relative_to(ROOT)}")
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
