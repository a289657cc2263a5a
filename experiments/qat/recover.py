"""How much of what 2-bit rounding loses training gives back: the bundled model, W2 g64.

    python experiments/qat/recover.py --text books_fineweb.txt.gz

Trains with `qjax qat` (learned steps, the float model as teacher) on a text, and scores
the float model, round-to-nearest and the trained model on another. Each run replaces
its row in `results/recover.jsonl`; the curve is `results/recover.png`.
"""

import dataclasses
import gzip
import json
import shutil
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

import qjax
from qjax.commands.inputs import computing, open_model
from qjax.commands.qat import TrainQuantized
from qjax.commands.training import TrainingOptions
from qjax.data import encode_text, file_text, load_text
from qjax.evals import Protocol, perplexity
from qjax.results import Record, append, environment, read

HERE = Path(__file__).parent
BITS, GROUP = 2, 64


@dataclasses.dataclass(frozen=True)
class Options:
    """What to train on, and how."""

    text: Path | None = None
    """A UTF-8 text file, or one packed by gzip."""
    data: Literal["text", "generated"] = "text"
    """Train on --text, or on what the float model writes (LLM-QAT)."""
    windows: int = 4096
    """Windows to generate."""
    evaluate: Path | None = None
    """The text to score on (None: pydoc)."""
    tokens: int = 65536
    """Tokens of it."""
    method: Literal["lsq", "paretoq", "ste"] = "paretoq"
    """For the weights."""
    steps: int = 900
    """Updates."""
    batch: int = 8
    """Windows in a batch."""
    length: int = 256
    """Tokens in a window."""
    learning_rate: float = 1e-3
    """The highest."""
    run: Path = Path("runs/qat")
    """The folder for checkpoints and the trained model; a killed job goes on."""
    out: Path = HERE / "results" / "recover.jsonl"
    """Where the row goes."""


def plain_text(path: Path, folder: Path) -> Path:
    """The file itself, or what it packs, in `folder`."""
    if path.suffix != ".gz":
        return path
    target = folder / path.stem
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        new = target.with_suffix(".new")
        with gzip.open(path) as packed, new.open("wb") as file:
            shutil.copyfileobj(packed, file)
        new.rename(target)
    return target


def training(options: Options) -> TrainQuantized:
    """The job, as `qjax qat` runs it."""
    text = options.text
    if options.data == "text":
        if text is None:
            raise ValueError("give --text, a file to train on, or --data generated")
        text = plain_text(text, options.run)
    return TrainQuantized(
        "bundled",
        options.run / "model",
        options.method,
        BITS,
        GROUP,
        teacher="self",
        data=options.data,
        windows=options.windows,
        overwrite=True,
        training=TrainingOptions(
            text=None if options.data == "generated" else text,
            length=options.length,
            batch=options.batch,
            steps=options.steps,
            learning_rate=options.learning_rate,
            held_out=64,
            eval_every=100,
            save_every=100,
        ),
    )


def main(options: Options) -> None:
    """Train, score, and write the row and the curve."""
    model, job = open_model("bundled"), training(options)
    text = file_text(options.evaluate) if options.evaluate else load_text("pydoc")
    tokens = encode_text(model.tokenizer, text)[: options.tokens]

    def nll(params: Any) -> float:
        run = qjax.apply(model.f)
        params = computing(params, "float32")
        return perplexity(run, params, tokens, Protocol(), progress=False).scores.nll

    losses = {"float": nll(model.params)}
    for name, symmetric in (("symmetric", True), ("asymmetric", False)):
        weights = qjax.Int(BITS, qjax.group(GROUP), symmetric=symmetric)
        rounded = qjax.quantize(
            model.f,
            model.params,
            qjax.RTN(weights=weights),
            example=model.example,
            progress=False,
        )
        losses[f"rtn {name}"] = nll(rounded)
    began = time.perf_counter()
    job.run()
    seconds = time.perf_counter() - began
    losses["trained"] = nll(open_model(str(job.out)).params)
    rounded = min(losses["rtn symmetric"], losses["rtn asymmetric"])
    metrics = {
        "nll_float": losses["float"],
        "nll_rtn": rounded,
        "nll_rtn_symmetric": losses["rtn symmetric"],
        "nll_rtn_asymmetric": losses["rtn asymmetric"],
        "nll_trained": losses["trained"],
        "recovered": (rounded - losses["trained"]) / (rounded - losses["float"]),
        "minutes": seconds / 60,
    }
    print(json.dumps(metrics, indent=1))
    about = {
        key: str(value.name) if isinstance(value, Path) else value
        for key, value in dataclasses.asdict(options).items()
    }
    where = environment() | {
        "text": {"name": text.name, "sha256": text.sha256},
        "scored_tokens": int(np.size(tokens)),
    }
    label = f"{options.method}, {options.data}"
    kept = [r for r in read(options.out) if r.label != label] if _there(options) else []
    options.out.unlink(missing_ok=True)
    for row in [*kept, Record(label, about, metrics, where)]:
        append(options.out, row)
    curve = job.training.folder(job.out) / "loss.png"
    shutil.copyfile(curve, options.out.with_name(f"recover_{options.data}.png"))


def _there(options: Options) -> bool:
    return options.out.is_file()


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
