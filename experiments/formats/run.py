"""Checkpoints in and out: what other libraries make of ours, and we of theirs.

    python experiments/formats/run.py export WORK [MODEL ...] [ROW ...]
    python experiments/formats/run.py collect WORK [ROW ...]
    python experiments/formats/run.py linears WORK
    python experiments/formats/run.py summarise

`export` writes the bundled model and a random one of every architecture in every scheme
into `WORK/ours`, each with the logits of `qjax.apply`; what is there stays. Between the
two, the peers open those and write their own into `WORK/theirs` (README.md has the
commands). `collect` loads theirs, and writes `results/matrix.jsonl`,
`results/architectures.jsonl` and the summary `results/formats.jsonl`: for each scheme
and peer the largest difference of a token's logits over the largest logit, the median
of the tokens and the worst token. Two more say why some are large:
`results/linears.jsonl`, every linear on the peer's own inputs, and
`results/fused.jsonl`, experts that transformers fuses. `linears` and `summarise` write
the former, and the summary, alone.

Cost, on one core: 10 minutes for the random models, 20 for the bundled one; as much
again for the peers.
"""

import json
import re
import shutil
import sys
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from time import process_time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rows import ARCHITECTURES, EXPERTS, OUTSIDE, ROWS, Row

import qjax
from qjax.commands.inputs import BUNDLED
from qjax.core.qtensor import is_quantized
from qjax.io.huggingface import read_config
from qjax.io.named import named_leaves
from qjax.ops import matmul
from qjax.results import Record, append, environment, read

RESULTS = Path(__file__).parent / "results"
WAYS = ("out_", "in_")
SEEN, COMPARED = 8, 4  # tokens in a row, rows, of which logits are compared


def tokens(folder: Path) -> np.ndarray:
    """A few random rows."""
    config = json.loads((folder / "config.json").read_text())
    draw = np.random.default_rng(3)
    return draw.integers(2, config["vocab_size"], (COMPARED, SEEN)).astype(np.int32)


def logits(f: Any, params: Any, ids: np.ndarray) -> np.ndarray:
    """What `qjax.apply` makes of them."""
    return np.asarray(jax.jit(qjax.apply(f))(params, jnp.asarray(ids)))


def export(work: Path, *only: str) -> None:
    """Write ours, and what we expect of them; a refusal is kept as a result.

    `only`: models, and folders of rows; all of either where none is named.
    """
    rows = [row for row in ROWS if row.folder in only] or ROWS
    every = ("bundled", *ARCHITECTURES)
    for kind in [each for each in every if each in only] or every:
        base = BUNDLED if kind == "bundled" else work / "architectures" / kind
        loaded = qjax.load_model(base, dtype=jnp.float32, scan_layers=True)[:2]
        kept: Any = cache(partial(_quantized, *loaded, tokens(base)))
        for row in rows:
            if kind != "bundled" and row.narrow is not None:
                row = replace(row, recipe=row.narrow)
            if kind in OUTSIDE and row.format in ("gptq", "gptq-v2"):
                left = replace(row.recipe, ignore=OUTSIDE[kind])
                row = replace(row, recipe=left)
            _export(row, base, kept, work / "ours" / kind / row.folder)


def _quantized(
    f: Any, params: Any, ids: np.ndarray, recipe: Any, coded_cache: bool
) -> tuple[Any, np.ndarray]:
    """The parameters of a recipe, and what `qjax.apply` makes of the tokens."""
    draw = np.random.default_rng(4)
    batches = [(jnp.asarray(draw.permutation(ids)),) for _ in range(2)]
    if coded_cache:
        f, params = qjax.quantize_cache(f, params, batches)
    qparams = qjax.quantize(f, params, recipe, batches, progress=False)
    return qparams, logits(f, qparams, ids)


def _export(row: Row, base: Path, quantized: Any, out: Path) -> None:
    """`quantized(recipe, coded_cache)`: several formats hold the same parameters."""
    if (out / "expected.npz").exists() or (out / "refused.json").exists():
        return
    shutil.rmtree(out, ignore_errors=True)
    try:
        qparams, expected = quantized(row.recipe, row.coded_cache)
        qjax.export(out, qparams, model=base, format=row.format)
    except (TypeError, ValueError) as error:
        out.mkdir(parents=True)
        (out / "refused.json").write_text(json.dumps({"refused": str(error)}))
        print(out.parent.name, out.name, error, flush=True)
        return
    np.savez(out / "expected.npz", tokens=tokens(base), logits=expected)
    print("wrote", out.parent.name, out.name, f"{process_time():.1f} s", flush=True)


def differences(out: Path) -> dict[str, Any]:
    """What the peers reported of one of our exports, by reader."""
    found = {}
    if (out / "refused.json").exists():
        found["export"] = json.loads((out / "refused.json").read_text())
    for file in sorted(out.glob("opened-*.json")):
        found[file.stem.removeprefix("opened-")] = json.loads(file.read_text())
    return found


def loaded(folder: Path) -> dict[str, Any]:
    """A peer's checkpoint in qjax, kept in `loaded.json`: see `_loaded`."""
    kept = folder / "loaded.json"
    if not kept.exists():
        kept.write_text(json.dumps(_loaded(folder)))
    return json.loads(kept.read_text())


def _loaded(folder: Path) -> dict[str, Any]:
    """The difference of logits, or why it is refused."""
    with np.load(folder / "logits.npz") as held:
        ids, expected = held["tokens"], held["logits"]
    try:
        f, params, _, _ = qjax.load_model(folder, dtype=jnp.float32)
    except ValueError as error:
        return {"refused": str(error).replace(str(folder), folder.name)}
    each = np.abs(logits(f, params, ids) - expected).max(-1) / np.abs(expected).max()
    return {"difference": float(np.median(each)), "worst": float(each.max())}


def record(label: str, reports: dict[str, Any]) -> Record:
    """One line: medians as metrics, by reader, and the worst token of all readers.

    The worst of each, refusals and versions are its context.
    """
    metrics = {
        k: v.get("difference", v.get("word"))
        for k, v in reports.items()
        if "difference" in v or "word" in v
    }
    refused = {k: v["refused"][:200] for k, v in reports.items() if "refused" in v}
    # Some name files: where they were is of no interest.
    refused = {k: re.sub(r"\S*/(?=\S)", "", v) for k, v in refused.items()}
    worst = {k: v["worst"] for k, v in reports.items() if "worst" in v}
    peers = {k: v["versions"] for k, v in reports.items() if "versions" in v}
    context = {**environment(), "worst": worst, "refused": refused, "peers": peers}
    metrics |= worst_tokens(worst)
    return Record(label, {"readers": sorted(reports)}, metrics, context)


def worst_tokens(worst: dict[str, float]) -> dict[str, float]:
    """The worst token of all readers: out and in apart, where they are told apart."""
    if not any(name.startswith(WAYS) for name in worst):
        return {"worst_token": max(worst.values())} if worst else {}
    found = {
        f"{way}worst_token": [v for k, v in worst.items() if k.startswith(way)]
        for way in WAYS
    }
    return {name: max(values) for name, values in found.items() if values}


def summary(format: str, rows: list[Record]) -> Record:
    """A format in one line: schemes that were opened, largest medians, worst tokens."""
    metrics: dict[str, Any] = {"schemes": len(rows)}
    for way in WAYS:
        each = [{k for k in row.context["worst"] if k.startswith(way)} for row in rows]
        metrics[f"{way}opened"] = sum(map(bool, each))
        pairs = [(row, name) for row, names in zip(rows, each) for name in names]
        if pairs:
            metrics |= {
                f"{way}largest_median": max(row.metrics[k] for row, k in pairs),
                f"{way}worst_token": max(row.context["worst"][k] for row, k in pairs),
            }
    own = ("worst", "refused", "peers")
    context = {k: v for k, v in rows[0].context.items() if k not in own}
    return Record(format, {}, metrics, context)


def opened(work: Path, row: Row) -> dict[str, Any]:
    """By architecture, the largest difference among its readers, or why there is none.

    A reader that refuses counts only where no other reads it; one that fuses experts,
    where no other keeps them apart.
    """
    found = {}
    for kind in ARCHITECTURES:
        reports = differences(work / "ours" / kind / row.folder)
        if kind in EXPERTS and len(reports) > 1:
            reports.pop("transformers", None)
        read = [each for each in reports.values() if "difference" in each]
        if read:
            found[kind] = max(read, key=lambda each: each["difference"])
        elif reports:
            word = "not held" if "export" in reports else "not read"
            found[kind] = next(iter(reports.values())) | {"word": word}
    return found


def fused(work: Path, row: Row) -> dict[str, Any]:
    """What transformers makes of experts that it fuses."""
    found = {}
    for kind in EXPERTS:
        reports = differences(work / "ours" / kind / row.folder)
        if "transformers" in reports:
            found[kind] = {"word": "not read"} | reports["transformers"]
    return found


def linears(work: Path, row: Row) -> dict[str, Any]:
    """By model, the largest difference of a linear's output for the peer's input."""
    found = {}
    for kind in ("bundled", *ARCHITECTURES):
        folder = work / "ours" / kind / row.folder
        reader = "unfused" if kind in EXPERTS else "*"
        for file in sorted(folder.glob(f"linears-{reader}.npz")):
            kept = file.with_suffix(".json")
            if not kept.exists():
                with np.load(file) as held:
                    kept.write_text(json.dumps(_linears(folder, dict(held))))
            found[kind] = json.loads(kept.read_text())
    return found


def _linears(folder: Path, held: dict[str, np.ndarray]) -> dict[str, Any]:
    """The largest over all linears, each over its largest output; how many they are."""
    _, params, _, config = qjax.load_model(folder, dtype=jnp.float32)
    module, run, each = read_config(folder)[0], jax.jit(matmul), []
    for named in named_leaves(module, config, params):
        if f"{named.module}.x" not in held or not is_quantized(named.leaf):
            continue  # a bias has its module's name
        x, y = held[f"{named.module}.x"], held[f"{named.module}.y"]
        rows = np.zeros((COMPARED * SEEN, x.shape[1]), np.float32)
        rows[: len(x)] = x  # experts see fewer tokens
        weight = replace(named.leaf, dtype=jnp.dtype(jnp.float32))
        ours = np.asarray(run(jnp.asarray(rows), weight))[: len(x)]
        each.append(float(np.abs(ours - y).max() / np.abs(y).max()))
    return {"difference": max(each), "linears": len(each)}


def by_peer(work: Path, row: Row) -> dict[str, Any]:
    """What readers made of the bundled model, and we of theirs."""
    out = work / "ours" / "bundled" / row.folder
    reports = {f"out_{k}": v for k, v in differences(out).items()}
    for case in row.theirs:
        if (work / "theirs" / case / "logits.npz").exists():
            peer, _, rest = case.partition("-")
            again = f"in_{peer}" in reports
            name = f"in_{peer}_{rest}" if again else f"in_{peer}"
            reports[name] = loaded(work / "theirs" / case)
    return reports


TABLES = {
    "matrix": by_peer,
    "architectures": opened,
    "fused": fused,
    "linears": linears,
}
WHOLE = ("matrix", "architectures")  # have a line for every row


def collect(work: Path, *only: str) -> None:
    """Load theirs and write the tables' lines: of all rows, or of those named."""
    rows = [row for row in ROWS if row.folder in only] or ROWS
    lines: dict[str, list[Record]] = {}
    for name, table in TABLES.items():
        file, found = RESULTS / f"{name}.jsonl", {}
        if rows != ROWS:
            found = {each.label: each for each in read(file)}
        for row in rows:
            found.pop(row.label, None)
            reports = table(work, row)
            if reports or name in WHOLE:
                found[row.label] = record(row.label, reports)
                print(name, row.label, reports, flush=True)
        lines[name] = [found[row.label] for row in ROWS if row.label in found]
    lines["formats"] = summaries(lines["matrix"])
    for name, records in lines.items():
        write(name, records)


def summaries(matrix: list[Record]) -> list[Record]:
    """A line for each format."""
    held = {each.label: each for each in matrix}
    return [
        summary(each, [held[row.label] for row in ROWS if row.format == each])
        for each in dict.fromkeys(row.format for row in ROWS)
    ]


def write(name: str, records: list[Record]) -> None:
    """Write a file of results anew."""
    (RESULTS / f"{name}.jsonl").unlink(missing_ok=True)
    for each in records:
        append(RESULTS / f"{name}.jsonl", each)


def collect_linears(work: Path) -> None:
    """Write the lines of linears on the readers' inputs; other rows keep theirs."""
    found = {each.label: each for each in read(RESULTS / "linears.jsonl")}
    for row in ROWS:
        if reports := linears(work, row):
            found[row.label] = record(row.label, reports)
    write("linears", [found[row.label] for row in ROWS if row.label in found])


def summarise() -> None:
    """Write the summary of the matrix, and the worst tokens of its lines."""
    for name in WHOLE:
        rows = read(RESULTS / f"{name}.jsonl")
        worst = [worst_tokens(dict(row.context["worst"])) for row in rows]
        write(
            name,
            [
                replace(row, metrics={**row.metrics, **each})
                for row, each in zip(rows, worst, strict=True)
            ],
        )
    write("formats", summaries(read(RESULTS / "matrix.jsonl")))


if __name__ == "__main__":
    # Every program runs once: most of the time goes into compiling.
    jax.config.update("jax_disable_most_optimizations", True)
    job, *work = sys.argv[1:]
    jobs = {"export": export, "collect": collect, "linears": collect_linears}
    if job == "summarise":
        summarise()
    else:
        jobs[job](Path(work[0]), *work[1:])
