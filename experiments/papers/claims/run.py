"""What the papers of calibrated methods claim, on the bundled model.

    python experiments/papers/claims/run.py
    python experiments/papers/claims/run.py --methods awq qep

Calibrates with windows from the end of the Python language reference and scores its
start. For each method it writes `results/<method>.jsonl`, a row for each setting with
the paper's number beside ours, and its claims into `results/claims.jsonl`. A claim is
that one setting's KL divergence from full precision is below another's.

Models that papers are about have what 7M parameters have not: channels of activations
that are far larger than others (`outliers`: those of `scripts/outlier_variant.py`), or
of weights (`imbalanced`: rows of v and up against columns of o and down). Both compute
what the bundled model does.
"""

import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import tyro
from settings import PAPERS, Less, Paper, Row

import qjax
from qjax.commands.inputs import BUNDLED
from qjax.data import encode_text, load_text
from qjax.evals import Protocol, Yardstick
from qjax.io.huggingface import load_weights, read_tokenizer
from qjax.results import Record, append, environment, read

HERE = Path(__file__).parent
sys.path.append(str(HERE.parents[2] / "scripts"))

import outlier_variant  # noqa: E402

CLAIMS = HERE / "results" / "claims.jsonl"
EXPERIMENTS = HERE.parents[1]
RECORDED = {
    "compare": EXPERIMENTS / "compare/results/compare.jsonl",
    "calibrated": EXPERIMENTS / "compare/results/calibrated/compare.jsonl",
    "ptq": EXPERIMENTS / "papers/ptq/results/qjax.jsonl",
}


@dataclass(frozen=True)
class Options:
    """What to run."""

    methods: tuple[str, ...] = tuple(PAPERS)
    """Of `settings.py`."""
    rows: int = 16
    """Windows to calibrate with."""
    length: int = 256
    """Tokens in one."""
    tokens: int = 4096
    """Tokens to score."""


def model(name: str) -> tuple[Any, Any]:
    """`(f, params)` in float32."""
    if name == "bundled":
        return load_weights(BUNDLED, dtype=jnp.float32, scan_layers=True)[:2]
    channels, inside = {"outliers": (4, 0), "imbalanced": (0, 4)}[name]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / name
        outlier_variant.main(
            outlier_variant.Options(BUNDLED, out, channels=channels, inside=inside)
        )
        return load_weights(out, dtype=jnp.float32, scan_layers=True)[:2]


def text(options: Options) -> tuple[list[tuple[np.ndarray]], np.ndarray]:
    """Batches of the text's end, and its start."""
    tokens = encode_text(read_tokenizer(BUNDLED), load_text("pydoc"))
    count = options.rows * options.length
    if tokens.size < count + options.tokens:
        raise ValueError(f"the text has only {tokens.size} tokens")
    rows = tokens[-count:].reshape(options.rows, options.length)
    return [(rows[i : i + 8],) for i in range(0, len(rows), 8)], tokens[
        : options.tokens
    ]


def quantized(row: Row, f: Any, params: Any, batches: list[Any]) -> Any:
    """The parameters of one setting."""
    recipe = row.recipe
    if recipe is None:
        return params
    if callable(recipe):
        recipe = recipe(f, params, batches)
    return qjax.quantize(f, params, recipe, batches, progress=False)


def recorded(row: Row) -> dict[str, float | None]:
    """The metrics of a setting that another experiment ran, on the same text."""
    file, label = str(row.recorded).split("/", 1)
    lines = RECORDED[file].read_text(encoding="utf-8").splitlines()
    found = {each["label"]: each["metrics"] for each in map(json.loads, lines)}[label]
    perplexity = found.get("perplexity", found.get("perplexity_pydoc"))
    kl = found.get("kl", found.get("kl_pydoc"))
    return {"paper": row.paper, "perplexity": perplexity, "kl": kl}


def measured(
    row: Row, loaded: tuple[Any, Any], batches: list[Any], yardstick: Yardstick
) -> dict[str, float | None]:
    """The metrics of one setting."""
    f, params = loaded
    q = quantized(row, f, params, batches)
    found = yardstick.measure((qjax.apply(f), q), progress=False)
    return {
        "paper": row.paper,
        "perplexity": found.candidate.perplexity,
        "kl": found.kl,
    }


def verdict(name: str, claim: Less, rows: dict[str, dict[str, Any]]) -> Record:
    """Whether a claim holds here."""
    better, worse = (rows[label]["kl"] for label in (claim.better, claim.worse))
    metrics = {
        "kl_better": better,
        "kl_worse": worse,
        "ratio": better / worse,
        "holds": int(better < claim.margin * worse),
    }
    label = f"{name}: {claim.better} below {claim.worse}"
    return Record(label, {"method": name, "margin": claim.margin}, metrics)


def replace(path: Path, records: Sequence[Record], own: Any) -> None:
    """Write records in place of those that `own` says are of this run."""
    kept = [] if not path.is_file() else [r for r in read(path) if not own(r)]
    path.unlink(missing_ok=True)
    order = list(PAPERS)
    records = [*kept, *records]
    for record in sorted(records, key=lambda r: order.index(r.config["method"])):
        append(path, record)


def run(name: str, paper: Paper, options: Options) -> None:
    """One method."""

    @cache
    def ready() -> tuple[Any, Any, Any]:
        loaded = model(paper.model)
        batches, tokens = text(options)
        return loaded, batches, Yardstick(loaded, tokens, Protocol(512, batch=4))

    run_here = any(row.recorded is None for row in paper.rows)
    own = {**environment(), "scored_tokens": options.tokens, "variant": paper.model}
    context = own if run_here else {}
    rows = {}
    records = []
    for row in paper.rows:
        known = row.recorded is not None
        rows[row.label] = recorded(row) if known else measured(row, *ready())
        print(name, row.label, rows[row.label], flush=True)
        config = {"method": name, "source": paper.source, "model": paper.model}
        records.append(Record(row.label, config, rows[row.label], context))
    replace(HERE / "results" / f"{name}.jsonl", records, lambda _: True)
    verdicts = [verdict(name, claim, rows) for claim in paper.claims]
    replace(CLAIMS, verdicts, lambda r: r.config["method"] == name)
    for each in verdicts:
        print(each.label, "holds" if each.metrics["holds"] else "DOES NOT HOLD")


def main(options: Options) -> None:
    """Every method that was asked for."""
    for name in options.methods:
        run(name, PAPERS[name], options)


if __name__ == "__main__":
    main(tyro.cli(Options))
