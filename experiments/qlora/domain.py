"""QLoRA beside float LoRA on a new domain: the bundled model learns program text.

    python experiments/qlora/domain.py --text code.txt

Adapters of the same rank are trained by `qjax finetune` from the same start, with the
same batches, beside the float model and beside its NF4 codes with double quantization.
The loss is that of windows at the end of the text that no step sees. Each run replaces
its row in `results/domain.jsonl`; the curve is `results/domain.png`.
"""

import dataclasses
import json
import shutil
import time
from pathlib import Path
from typing import Any

import tyro
from matplotlib.figure import Figure

from qjax.commands.finetune import Finetune
from qjax.commands.training import TrainingOptions
from qjax.data import file_text
from qjax.results import Record, append, environment
from qjax.train.loop import read_metrics

HERE = Path(__file__).parent
SIDES = {"LoRA float": None, "QLoRA NF4": "NF4_DQ"}


@dataclasses.dataclass(frozen=True)
class Options:
    """What to train on, and how."""

    text: Path
    """A UTF-8 text file of the new domain."""
    steps: int = 200
    """Updates."""
    batch: int = 8
    """Windows in a batch."""
    length: int = 128
    """Tokens in a window."""
    rank: int = 16
    """Of the adapters."""
    learning_rate: float = 2e-3
    """The highest."""
    held_out: int = 64
    """Windows that are scored."""
    run: Path = Path("runs/qlora")
    """The folder for checkpoints and adapters; a killed job goes on."""
    out: Path = HERE / "results" / "domain.jsonl"
    """Where the rows go."""


def job_of(options: Options, label: str) -> Finetune:
    """One side, as `qjax finetune` runs it."""
    training = TrainingOptions(
        text=options.text,
        length=options.length,
        batch=options.batch,
        steps=options.steps,
        learning_rate=options.learning_rate,
        held_out=options.held_out,
        eval_every=options.steps // 4,
        save_every=options.steps // 4,
        precision="float32",
    )
    out = options.run / label.replace(" ", "_").lower()
    scheme = SIDES[label]
    return Finetune("bundled", out, scheme, options.rank, training=training)


def losses_of(job: Finetune) -> list[dict[str, Any]]:
    """The held-out losses."""
    lines = read_metrics(job.training.folder(job.out))
    return [line for line in lines if "held_out_loss" in line]


def main(options: Options) -> None:
    """Train both, and write rows and curve."""
    options.run.mkdir(parents=True, exist_ok=True)
    jobs = {label: job_of(options, label) for label in SIDES}
    minutes = {}
    for label, job in jobs.items():
        shutil.rmtree(job.out, ignore_errors=True)
        began = time.perf_counter()
        job.run()
        minutes[label] = (time.perf_counter() - began) / 60
    curves = {label: losses_of(job) for label, job in jobs.items()}
    last = {label: curve[-1]["held_out_loss"] for label, curve in curves.items()}
    text = file_text(options.text)
    about = {
        key: str(value.name) if isinstance(value, Path) else value
        for key, value in dataclasses.asdict(options).items()
    }
    options.out.unlink(missing_ok=True)
    for label, curve in curves.items():
        metrics = {
            "loss_before": curve[0]["held_out_loss"],
            "loss_after": last[label],
            "of_float_lora": last[label] / last["LoRA float"],
            "minutes": minutes[label],
        }
        print(label, json.dumps(metrics), flush=True)
        where = environment() | {"text": {"name": text.name, "sha256": text.sha256}}
        append(options.out, Record(label, about, metrics, where))
    draw(options.out.with_suffix(".png"), curves)


def draw(path: Path, curves: dict[str, list[dict[str, Any]]]) -> None:
    """Held-out losses against steps."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for label, curve in curves.items():
        at = [line["step"] for line in curve]
        axes.plot(at, [line["held_out_loss"] for line in curve], label=label)
    axes.set(xlabel="updates", ylabel="held-out loss, nats for each token")
    axes.set_title("The bundled model learns program text")
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
