"""What the papers of training methods claim, in small: one to ten minutes for each.

    python experiments/papers/training/run.py --general wiki.txt --domain code.txt
    python experiments/papers/training/run.py --papers lsq pact

Writes `results/<paper>.jsonl`, a row for each setting with the paper's number beside
ours, the paper's claims into `results/claims.jsonl`, `results/curves.png` and, of the
papers on adapters, `results/adapters.png`.
"""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import adapters
import images
import language
import numpy as np
import tyro
from matplotlib.figure import Figure
from settings import PAPERS, Less, Paper

from qjax.data import file_text
from qjax.results import Record, append, environment, read

RESULTS = Path(__file__).parent / "results"
CLAIMS, CURVES = RESULTS / "claims.jsonl", RESULTS / "curves.jsonl"
ON_DOMAIN = ("qlora", *adapters.PAPERS)
LANGUAGE = language.PAPERS | adapters.PAPERS
EVERY = 5  # steps of a curve that make a point


@dataclass(frozen=True)
class Options:
    """What to run."""

    papers: tuple[str, ...] = tuple(PAPERS)
    """Of `settings.py`."""
    general: Path | None = None
    """A UTF-8 text for the language model to be trained and scored on."""
    domain: Path | None = None
    """Another, of a kind that it does not know: program text."""


def rows(name: str, options: Options) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metrics, and losses of every step, of a paper's rows.

    Raises:
      ValueError: the language model needs two texts.
    """
    if name in images.PAPERS:
        return images.rows(name), {}
    if options.general is None or options.domain is None:
        raise ValueError(f"{name} trains a language model: give --general and --domain")
    texts = language.Texts(options.general, options.domain)
    return LANGUAGE[name](texts)


def about(name: str, options: Options) -> dict[str, Any]:
    """What was trained on."""
    if name in images.PAPERS:
        return {"data": "scikit-learn digits"}
    path = options.domain if name in ON_DOMAIN else options.general
    assert path is not None
    text = file_text(path)
    return {"text": {"name": text.name, "sha256": text.sha256}}


def run_paper(name: str, paper: Paper, options: Options) -> None:
    """Its rows and curves, in place of earlier ones."""
    began = time.process_time()
    found, curves = rows(name, options)
    where = environment() | about(name, options)
    where |= {"cpu_minutes": round((time.process_time() - began) / 60, 2)}
    table = RESULTS / f"{name}.jsonl"
    table.unlink(missing_ok=True)
    for label, metrics in found.items():
        own = {"paper": paper.numbers.get(label), **metrics}
        append(table, Record(label, {"source": paper.source}, own, where))
    old = read(CURVES) if CURVES.is_file() else []
    kept = [record for record in old if record.config["paper"] != name]
    kept += [
        Record(label, {"paper": name}, {"loss": thin(curve)})
        for label, curve in curves.items()
    ]
    CURVES.unlink(missing_ok=True)
    for record in sorted(kept, key=lambda r: list(PAPERS).index(r.config["paper"])):
        append(CURVES, record)


def annotate(name: str, paper: Paper) -> None:
    """The paper's numbers, as `settings.py` has them, beside rows that are there."""
    table = RESULTS / f"{name}.jsonl"
    rows = read(table) if table.is_file() else []
    table.unlink(missing_ok=True)
    for row in rows:
        metrics = {**row.metrics, "paper": paper.numbers.get(row.label)}
        append(table, replace(row, config={"source": paper.source}, metrics=metrics))


def decided(name: str, claim: Less, table: dict[str, Record]) -> Record:
    """Whether a claim holds here."""
    pair = table[claim.better], table[claim.worse]
    better, worse = (record.metrics[claim.metric] for record in pair)
    metrics = {
        "better": better,
        "worse": worse,
        "ratio": better / worse,
        "margin": claim.margin,
        "holds": int(better < claim.margin * worse),
    }
    seeds = [r.metrics.get("seeds", {}).get(claim.metric) for r in pair]
    if all(seeds):
        ratios = np.divide(*seeds)
        metrics["ratio_error"] = float(np.std(ratios, ddof=1) / np.sqrt(ratios.size))
    where = {k: pair[0].context[k] for k in ("commit", "date")}
    label = f"{name}: {claim.better} below {claim.worse}, {claim.metric}"
    return Record(label, {"paper": name}, metrics, where)


def decide() -> None:
    """The claims of every paper whose rows are there."""
    CLAIMS.unlink(missing_ok=True)
    for name, paper in PAPERS.items():
        file = RESULTS / f"{name}.jsonl"
        table = {r.label: r for r in read(file)} if file.is_file() else {}
        for claim in paper.claims if table else ():
            record = decided(name, claim, table)
            append(CLAIMS, record)
            print(f"{record.label}: {record.metrics['ratio']:.3f}", flush=True)


def thin(curve: list[float]) -> list[float]:
    """Means of every few steps."""
    whole = len(curve) // EVERY * EVERY
    means = np.reshape(curve[:whole], (-1, EVERY)).mean(-1)
    return [round(float(x), 4) for x in means]


def draw(path: Path, records: list[Record]) -> None:
    """Losses against steps, a panel for each paper, at most five in a row."""
    names = list(dict.fromkeys(r.config["paper"] for r in records))
    down = -(-len(names) // 5)
    across = -(-len(names) // down)
    figure = Figure(figsize=(4 * across, 3.4 * down), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False).flat
    for axes, name in zip(panels, names):
        for record in records:
            if record.config["paper"] == name:
                losses = record.metrics["loss"]
                at = EVERY * (1 + np.arange(len(losses)))
                axes.plot(at, losses, label=record.label, linewidth=1)
        axes.set(title=name, xlabel="updates", ylabel="training loss, nats")
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=110)


def main(options: Options) -> None:
    """Every paper that was asked for; then all claims, and the curves."""
    for name in options.papers:
        run_paper(name, PAPERS[name], options)
    for name, paper in PAPERS.items():
        annotate(name, paper)
    decide()
    curves = read(CURVES) if CURVES.is_file() else []
    of = lambda papers: [r for r in curves if r.config["paper"] in papers]
    for picture, papers in (("curves", language.PAPERS), ("adapters", adapters.PAPERS)):
        if drawn := of(papers):
            draw(RESULTS / f"{picture}.png", drawn)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
