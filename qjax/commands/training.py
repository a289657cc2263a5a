"""What training subcommands take: a text, a schedule, and a folder for the run."""

import json
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from qjax.commands.inputs import Dtype, Model, computing
from qjax.commands.output import wide_console
from qjax.corpora import load_corpus
from qjax.data import Text, encode_text, load_text, windows
from qjax.plots import loss_plot
from qjax.train.loop import read_metrics, run_job
from qjax.train.offload import offloaded
from qjax.train.sharded import batch_sharding, shardings, training_mesh
from qjax.train.step import TrainState

OPTIONS = "options.json"
FREE = {"out", "overwrite", "run", "eval_every", "save_every"}
FREE |= {"offload", "data_parallel", "fsdp"}
"""Options that a job may change when it goes on."""
PATHS = {"model", "teacher", "text"}
"""Options that may name a file or a folder."""


@dataclass(frozen=True)
class TrainingOptions:
    """The text to train on, and how."""

    text: Path | None = None
    """A file, in place of a dataset: .txt, .json, .jsonl or .parquet, with a column of
    texts, messages or instructions; .gz of the first three."""
    dataset: str | None = None
    """Training text by name: pydoc (the default, offline), wikitext2, c4, ptb, pile,
    ultrachat, or any of `datasets`: a folder, owner/name, owner/name:configuration."""
    characters: int = 20_000_000
    """Of the text: documents from its start, until they have so many."""
    length: int = 128
    """Tokens in a window, at most the model's context."""
    batch: int = 8
    """Windows in a batch."""
    accumulate: int = 1
    """Batches whose gradients are averaged before each update."""
    steps: int = 200
    """Updates."""
    learning_rate: float = 1e-4
    """Of AdamW, after a warm-up over a tenth of the steps; falls to 0 by a cosine."""
    weight_decay: float = 0.0
    """Of AdamW."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    precision: Dtype | None = None
    """What the forward and backward pass compute in (None: what the parameters are
    stored in). What is trained and AdamW's moments are float32 always."""
    offload: bool = False
    """Keep AdamW's moments in the host's memory between steps."""
    data_parallel: int = 1
    """Devices among which batches are shared, beside those of --fsdp."""
    fsdp: int = 1
    """Devices among which parameters, AdamW's moments and batches are shared."""
    held_out: int = 16
    """Windows at the end of the text that are not trained on."""
    eval_every: int = 50
    """Steps between held-out losses."""
    save_every: int = 50
    """Steps between checkpoints."""
    seed: int = 0
    """Of the order of windows, and of everything drawn at random."""
    run: Path | None = None
    """The folder for checkpoints, metrics.jsonl and loss.png (OUT with .run behind). A
    job that was killed goes on from its last checkpoint."""

    def folder(self, out: Path) -> Path:
        """The run's folder."""
        return self.run or out.with_name(out.name + ".run")

    def key(self) -> jax.Array:
        """Of everything drawn at random."""
        return jax.random.key(self.seed)

    def computing(self, params: Any, stored: Any) -> Any:
        """Parameters as the forward pass sees them; `stored` are the model's."""
        if self.precision is not None:
            return computing(params, self.precision)
        return jax.tree.map(lambda x, own: x.astype(own.dtype), params, stored)

    def mesh(self) -> Mesh | None:
        """The devices; None for one.

        Raises:
          ValueError: there are not so many, or they do not divide a batch.
        """
        mesh = training_mesh(self.data_parallel, self.fsdp)
        if mesh is not None and self.batch % mesh.size:
            raise ValueError(
                f"--batch is {self.batch}, which {mesh.size} devices cannot share "
                f"evenly: give a multiple of {mesh.size}"
            )
        return mesh

    def optimiser(self) -> optax.GradientTransformation:
        """AdamW with its schedule."""
        self._check()
        warm = max(self.steps // 10, 1)
        schedule = optax.warmup_cosine_decay_schedule(
            0.0, self.learning_rate, warm, max(self.steps, warm + 1)
        )
        adamw = optax.adamw(schedule, weight_decay=self.weight_decay)
        whole = optax.chain(optax.clip_by_global_norm(self.clip), adamw)
        return offloaded(whole) if self.offload else whole

    def _check(self) -> None:
        for name in ("length", "batch", "accumulate", "steps", "held_out"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"--{name.replace('_', '-')} is {getattr(self, name)}: "
                    "give 1 or more"
                )

    def rows(self, model: Model) -> tuple[np.ndarray, np.ndarray]:
        """Windows to train on, and held-out ones, `[windows, length]`.

        Raises:
          ValueError: the text is too short, or the model has no tokenizer.
        """
        if model.tokenizer is None:
            raise ValueError(f"{model.name} has no tokenizer to read the text with")
        text = self.training_text(model.tokenizer)
        context = getattr(model.config, "context", None) or self.length
        cut = windows(encode_text(model.tokenizer, text), min(self.length, context))
        if len(cut.tokens) <= self.held_out:
            raise ValueError(
                f"the text has {len(cut.tokens)} windows, of which "
                f"--held-out {self.held_out} leaves none to train on"
            )
        return cut.tokens[: -self.held_out], cut.tokens[-self.held_out :]

    def training_text(self, tokenizer: Any) -> Text:
        """The text.

        Raises:
          ValueError: two texts are asked for, or there is none of that name.
          OSError: it cannot be had.
        """
        if self.text is not None and self.dataset is not None:
            raise ValueError("--text and --dataset name two texts: give one of them")
        if self.text is None and self.dataset in (None, "pydoc"):
            return load_text("pydoc")
        if self.text is not None and not self.text.exists():
            raise FileNotFoundError(f"--text {str(self.text)!r} does not exist")
        corpus = load_corpus(self.text or str(self.dataset))
        return corpus.text(tokenizer, self.characters)

    def batches(self, rows: np.ndarray, number: int) -> np.ndarray:
        """The windows of a step, `[accumulate, batch, length]`: drawn by its number."""
        draw = np.random.default_rng((self.seed, number))
        chosen = draw.integers(0, len(rows), (self.accumulate, self.batch))
        return rows[chosen]


@runtime_checkable
class Job(Protocol):
    """A subcommand that trains."""

    @property
    def out(self) -> Path:
        """What it writes."""
        ...

    @property
    def training(self) -> TrainingOptions:
        """How."""
        ...


def run_training(
    job: Job,
    title: str,
    step: Callable[..., tuple[TrainState, Any]],
    state: TrainState,
    held_out_loss: Callable[..., Any],
    data: tuple[np.ndarray, np.ndarray],
    frozen: Any,
) -> TrainState:
    """Train with checkpoints, metrics and a picture of the losses.

    Args:
      job: the command; the run's folder has its result's name.
      title: of the picture.
      step: as `qjax.train.step.training_step` makes it.
      state: before the first step.
      held_out_loss: `held_out_loss(state, tokens, *frozen)`.
      data: windows to train on, and held-out ones.
      frozen: further arguments of `step` and `held_out_loss`.

    Raises:
      ValueError: the run's folder holds a job with other options.
    """
    rows, held = data
    options = job.training
    mesh, key, folder = options.mesh(), options.key(), options.folder(job.out)
    if not check_same_job(job):
        _write_options(job, folder)
    # The start is given away to the first step; parameters are still the model's.
    state = replace(state, trained=jax.tree.map(jnp.copy, state.trained))
    measure = jax.jit(held_out_loss)
    if mesh is None:
        jitted = jax.jit(step, donate_argnums=0)
    else:
        where = shardings(state, mesh)
        state = jax.device_put(state, where)
        frozen = jax.device_put(frozen, shardings(frozen, mesh))
        jitted = jax.jit(step, donate_argnums=0, out_shardings=(where, None))

    def placed(tokens: Any, axis: int) -> Any:
        if mesh is None:
            return jnp.asarray(tokens)
        where = batch_sharding(mesh, tokens.shape[axis], axis)
        return jax.device_put(tokens, where)

    def once(state: TrainState, number: int) -> tuple[TrainState, Any]:
        return jitted(state, placed(options.batches(rows, number), 1), key, *frozen)

    def evaluate(state: TrainState) -> float:
        parts = [
            held[i : i + options.batch] for i in range(0, len(held), options.batch)
        ]
        losses = [float(measure(state, placed(p, 0), *frozen)) for p in parts]
        return float(np.average(losses, weights=[len(p) for p in parts]))

    console = wide_console()

    def report(line: dict[str, Any]) -> None:
        if "held_out_loss" in line:
            console.print(f"step {line['step']}: held-out {line['held_out_loss']:.4f}")

    state = run_job(
        once,
        state,
        folder,
        steps=options.steps,
        save_every=options.save_every,
        evaluate=evaluate,
        evaluate_every=options.eval_every,
        report=report,
    )
    loss_plot(folder / "loss.png", read_metrics(folder), title)
    return state


def check_same_job(job: Job) -> bool:
    """Whether a job goes on, with the options that it began with.

    It goes on where its run's folder has a checkpoint. Options that the job began
    without, as those of an older qjax, count as their defaults.

    Raises:
      ValueError: an option differs.
    """
    folder = job.training.folder(job.out)
    file = folder / OPTIONS
    if not file.is_file() or not any(folder.glob("step-*")):
        return False
    known = json.loads(file.read_text(encoding="utf-8"))
    first = _defaults(job) | known
    for name, value in _options(job).items():
        began = first[name]
        if value != began:
            raise ValueError(
                f"--{name.replace('_', '-')} is {value}, but the job in {folder} "
                f"began with {began}: give that, or another OUT"
            )
    return True


def _write_options(job: Job, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    new = (folder / OPTIONS).with_suffix(".new")
    new.write_text(json.dumps(_options(job), indent=2) + "\n", encoding="utf-8")
    new.replace(folder / OPTIONS)


def _options(job: Any) -> dict[str, str]:
    """What decides the steps of a job, in words; a path by what it leads to."""
    given = {each.name: getattr(job, each.name) for each in fields(job)}
    training = given.pop("training")
    given |= {each.name: getattr(training, each.name) for each in fields(training)}
    return {name: _word(name, given[name]) for name in sorted(given.keys() - FREE)}


def _defaults(job: Any) -> dict[str, str]:
    every = (*fields(job), *fields(job.training))
    stated = [each for each in every if each.default is not MISSING]
    return {each.name: _word(each.name, each.default) for each in stated}


def _word(name: str, value: Any) -> str:
    if name in PATHS and value is not None and Path(value).exists():
        return str(Path(value).resolve())
    return str(value)
