"""How much of what 2-bit rounding loses training gives back: the bundled model, W2 g64.

    python experiments/qat/recover.py --texts books_fineweb.txt.gz wiki.txt \
        technical.txt code.txt --evaluate wikitext2/test.txt

Scores the float model, round-to-nearest and AutoRound, then trains with `qjax qat`
(learned scales, the float model as teacher), each on the same texts and scored on
others. A row replaces its earlier one in `results/recover.jsonl`; `--run-only` leaves
the other rows as they are.
"""

import dataclasses
import gzip
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import tyro

import qjax
from qjax.commands.inputs import Model, computing, open_model
from qjax.commands.qat import TrainQuantized
from qjax.commands.training import TrainingOptions
from qjax.data import encode_text, file_text, load_text, windows
from qjax.evals import Protocol, perplexity
from qjax.results import Record, append, environment, read

HERE = Path(__file__).parent
BITS, GROUP = 2, 64
Row = Literal["float", "rtn", "rtn asymmetric", "autoround", "autoround asymmetric"]
ROWS: tuple[Row, ...] = (
    "float", "rtn", "rtn asymmetric", "autoround", "autoround asymmetric"
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Options:
    """What to train on, and how."""

    texts: tuple[Path, ...]
    """UTF-8 text files, or ones packed by gzip, to train and calibrate on."""
    characters: int = 4_000_000
    """Of each text, from its start."""
    data: Literal["text", "generated"] = "text"
    """Train on the texts, or on what the float model writes (LLM-QAT)."""
    generated: int = 4096
    """Windows to generate."""
    evaluate: tuple[Path, ...] = ()
    """Texts to score on, beside pydoc."""
    tokens: int = 65536
    """Tokens of each, at most."""
    method: Literal["lsq", "paretoq", "ste"] = "paretoq"
    """For the weights."""
    steps: int = 800
    """Updates."""
    batch: int = 8
    """Windows in a batch."""
    length: int = 256
    """Tokens in a window."""
    learning_rate: float = 1e-3
    """The highest."""
    run_only: tuple[Row | Literal["trained"], ...] = (*ROWS, "trained")
    """Which rows to make."""
    run: Path = Path("runs/qat")
    """The folder for checkpoints and the trained model; a killed job goes on."""
    out: Path = HERE / "results" / "recover.jsonl"
    """Where the rows go."""


def training_text(options: Options) -> Path:
    """The texts in one file, each behind the one before."""
    options.run.mkdir(parents=True, exist_ok=True)
    target = options.run / "text.txt"
    parts = []
    for path in options.texts:
        opened = gzip.open if path.suffix == ".gz" else open
        with opened(path, "rt", encoding="utf-8") as file:
            parts.append(file.read(options.characters))
    target.write_text("\n".join(parts), encoding="utf-8")
    return target


def job_of(options: Options) -> TrainQuantized:
    """The job, as `qjax qat` runs it."""
    written = options.data == "generated"
    return TrainQuantized(
        "bundled",
        options.run / "model",
        options.method,
        BITS,
        GROUP,
        teacher="self",
        data=options.data,
        windows=options.generated,
        overwrite=True,
        training=TrainingOptions(
            text=None if written else training_text(options),
            length=options.length,
            batch=options.batch,
            steps=options.steps,
            learning_rate=options.learning_rate,
            held_out=64,
            eval_every=100,
            save_every=100,
            precision="float32",
        ),
    )


def rounded(options: Options, model: Model, row: Row) -> Any:
    """The model by a method that does not train it."""
    if row == "float":
        return model.params
    name, *rest = row.split()
    own = {"symmetric": False} if rest else {}
    if name == "rtn":
        method: Any = qjax.RTN(weights=qjax.Int(BITS, qjax.group(GROUP), **own))
        data = None
    else:
        rule = {} if rest else {"scale_rule": "signed"}
        weights = qjax.Int(BITS, qjax.group(GROUP), **own, **rule)
        method = qjax.AutoRound(weights=weights)
        text = file_text(training_text(options))
        cut = windows(encode_text(model.tokenizer, text), options.length).tokens
        data = [(r[None],) for r in cut[:: len(cut) // 128][:128]]
    params = computing(model.params, "float32")
    return qjax.quantize(
        model.f, params, method, data, example=model.example, key=jax.random.key(0),
        progress=False,
    )  # fmt: skip


def scorer(options: Options, model: Model) -> tuple[Callable[..., Any], Any]:
    """`score(params)`, the negative log-likelihoods; and what the texts are."""
    texts = {"pydoc": load_text("pydoc")}
    texts |= {path.parent.name: file_text(path) for path in options.evaluate}
    cut = {
        name: encode_text(model.tokenizer, text)[: options.tokens]
        for name, text in texts.items()
    }
    run = qjax.apply(model.f)

    def score(params: Any) -> dict[str, float]:
        seen = computing(params, "float32")
        return {
            f"nll_{name}": perplexity(
                run, seen, tokens, Protocol(), progress=False
            ).scores.nll
            for name, tokens in cut.items()
        }

    about = {
        name: {"sha256": text.sha256, "tokens": int(np.size(cut[name]))}
        for name, text in texts.items()
    }
    return score, about


def with_shares(rows: dict[str, Record]) -> list[Record]:
    """Rows with what each gives back of the better round-to-nearest's loss."""
    found = []
    for row in rows.values():
        metrics = dict(row.metrics)
        for name in [n for n in metrics if n.startswith("nll_")]:
            known = [rows[r].metrics[name] for r in ROWS[1:3] if r in rows]
            if known and "float" in rows:
                lost = min(known) - rows["float"].metrics[name]
                text = name.removeprefix("nll_")
                back = min(known) - metrics[name]
                metrics[f"recovered_{text}"] = back / lost
        found.append(dataclasses.replace(row, metrics=metrics))
    return found


def main(options: Options) -> None:
    """Make each row, and write it."""
    model = open_model("bundled")
    score, texts = scorer(options, model)
    rows = {r.label: r for r in read(options.out)} if options.out.is_file() else {}
    about = dataclasses.asdict(options)
    about |= {"texts": [p.name for p in options.texts]}
    about = {k: v for k, v in about.items() if k not in ("run", "out", "evaluate")}
    for row in options.run_only:
        began, busy = time.perf_counter(), time.process_time()
        if row == "trained":
            job = job_of(options)
            job.run()
            params, label = open_model(str(job.out)).params, options.method
            label = f"{label}, {options.data}"
            curve = job.training.folder(job.out) / "loss.png"
            name = f"recover_{options.data}.png"
            shutil.copyfile(curve, options.out.with_name(name))
        else:
            params, label = jax.block_until_ready(rounded(options, model, row)), row
        minutes = (time.perf_counter() - began) / 60
        spent = (time.process_time() - busy) / 60
        metrics = score(params) | {"minutes": minutes, "cpu_minutes": spent}
        where = environment() | {"scored": texts}
        rows[label] = Record(label, about, metrics, where)
        print(label, json.dumps(with_shares(rows)[-1].metrics), flush=True)
        options.out.unlink(missing_ok=True)
        for each in with_shares(rows):
            append(options.out, each)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
