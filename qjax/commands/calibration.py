"""What calibrating subcommands take: a text to calibrate with, and where to run."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from qjax import cuts
from qjax.commands.inputs import Model, TextOptions
from qjax.corpora import encoder, load_corpus
from qjax.data import Text, encode_text, windows

Cut = Literal["drawn", "gptq", "awq", "smoothquant", "llmcompressor"]
# The cuts whose papers' code shuffles documents, each with the seed 42.
SHUFFLED = ("awq", "smoothquant", "llmcompressor")
# Lengths that padded documents are brought to, so that few programs are compiled.
BUCKETS = (64, 128, 256, 512, 1024, 2048, 4096)


class Batched(NamedTuple):
    """Batches of calibration, and the `mask_fn` of padded ones (None: no padding)."""

    batches: list[tuple[np.ndarray, ...]]
    mask_fn: Callable[..., Any] | None = None


@dataclass(frozen=True)
class MeshOptions:
    """The devices to run on; without them, the first one alone."""

    data: int = 1
    """Devices that share the calibration batches."""
    model: int = 1
    """Devices that share the columns of a solver."""
    coordinator: str | None = None
    """Address of process 0, such as 10.0.0.1:1234, where several processes run."""
    processes: int = 1
    """How many processes run."""
    process: int = 0
    """The number of this one."""

    def start(self) -> jax.sharding.Mesh | None:
        """The mesh; joins the other processes first.

        Raises:
          ValueError: there are not so many devices, or no coordinator for processes.
        """
        if self.processes > 1 and self.coordinator is None:
            raise ValueError(
                f"--calibration.mesh.processes is {self.processes}: give "
                "--calibration.mesh.coordinator too"
            )
        if self.coordinator is not None:
            jax.distributed.initialize(self.coordinator, self.processes, self.process)
        if self.data * self.model == 1:
            return None
        if self.data * self.model != jax.device_count():
            raise ValueError(
                f"--calibration.mesh.data {self.data} times --calibration.mesh.model "
                f"{self.model} must be the number of devices, {jax.device_count()}"
            )
        return jax.make_mesh(
            (self.data, self.model),
            ("data", "model"),
            axis_types=(jax.sharding.AxisType.Auto,) * 2,
        )

    @property
    def writes(self) -> bool:
        """Whether this process writes the result."""
        return self.process == 0


@dataclass(frozen=True)
class CalibrationText:
    """The text to calibrate with. Evaluate on another one."""

    text: Path | None = None
    """A UTF-8 text file, in place of a dataset; with --cut also .json, .jsonl or
    .parquet with a column of texts, messages or instructions."""
    dataset: str | None = None
    """A named text: pydoc (the default, offline), wikitext2, c4 or ptb; with --cut
    training text: wikitext2, c4, ptb, pile or ultrachat."""
    cut: Cut = "drawn"
    """How windows are cut: side by side, some of them drawn; at random places of the
    text, as GPTQ; out of short documents in random order, joined, as AWQ; or documents,
    truncated and padded: in random order, as SmoothQuant, or the first ones, as
    llm-compressor's examples."""
    streaming: bool = False
    """Read documents only as far as they are asked for (--cut llmcompressor)."""
    samples: int = 128
    """Windows (with awq, smoothquant and llmcompressor, documents) to calibrate with,
    drawn at random; fewer if the text is short."""
    length: int = 512
    """Tokens in a window, at most the model's context."""
    batch: int = 4
    """Windows in a batch."""
    seed: int | None = None
    """Of the choice of windows, and of what methods draw (0; of the choice with --cut
    awq, smoothquant and llmcompressor 42, as in their code)."""

    @property
    def choice_seed(self) -> int:
        """Of the choice of windows."""
        if self.seed is not None:
            return self.seed
        return 42 if self.cut in SHUFFLED else 0

    @property
    def method_seed(self) -> int:
        """Of what methods draw."""
        return self.seed or 0

    def load(self) -> Text:
        """The text. Raises ValueError if two are asked for, OSError if none is had."""
        dataset: Any = self.dataset
        return TextOptions(text=self.text, dataset=dataset).load()

    def batches(
        self, model: Model, evaluated: tuple[Text, int] | None = None
    ) -> Batched:
        """The batches, and what leaves padding out of them.

        Args:
          model: whose tokenizer and context count.
          evaluated: a text and how many of its tokens, from its start, are evaluated;
            none of them is calibrated with.

        Raises:
          ValueError: there is no text to cut them from.
        """
        for name in ("samples", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"--calibration.{name} is {getattr(self, name)}: give 1 or more"
                )
        if model.tokenizer is None:
            raise ValueError(f"{model.name} has no tokenizer to read the text with")
        length = min(self.length, getattr(model.config, "context", None) or self.length)
        if self.streaming and self.cut != "llmcompressor":
            raise ValueError(
                "--calibration.streaming reads the first documents alone, which is "
                f"--calibration.cut llmcompressor; {self.cut} chooses among all of them"
            )
        if self.cut != "drawn":
            rows = self._cut(model.tokenizer, length, evaluated)
            if isinstance(rows, np.ndarray):
                return self._batched(rows)
            shorter = [each for each in BUCKETS if each < length]
            vocabulary = model.config.vocabulary
            return Batched(
                *cuts.padded(rows, vocabulary, self.batch, (*shorter, length))
            )
        text = self.load()
        tokens = encode_text(model.tokenizer, text)
        if evaluated is not None and evaluated[0].sha256 == text.sha256:
            tokens = tokens[evaluated[1] :]
            if tokens.size < length:
                raise ValueError(
                    f"{text.name} is evaluated, and only {tokens.size} tokens of it are"
                    " left to calibrate with: give another --calibration.text or "
                    "--calibration.dataset"
                )
        return self._batched(
            drawn(windows(tokens, length).tokens, self.samples, self.choice_seed)
        )

    def _batched(self, rows: np.ndarray) -> Batched:
        starts = range(0, len(rows), self.batch)
        return Batched([(rows[i : i + self.batch],) for i in starts])

    def _cut(
        self, tokenizer: Any, length: int, evaluated: tuple[Text, int] | None
    ) -> np.ndarray | list[np.ndarray]:
        """Rows as GPTQ or AWQ cut them, or truncated documents."""
        if (self.text is None) == (self.dataset is None):
            raise ValueError(
                f"--calibration.cut {self.cut} needs one of --calibration.text and "
                "--calibration.dataset"
            )
        if evaluated is not None and self.text and evaluated[0].name == self.text.name:
            raise ValueError(
                f"{self.text} is evaluated: give another --calibration.text"
            )
        corpus = load_corpus(self.text or str(self.dataset), streaming=self.streaming)
        rows: Any = corpus.rows
        if self.cut == "llmcompressor":
            rows = list(itertools.islice(rows, self.samples))
        seed, encode = self.choice_seed, encoder(tokenizer, strip=self.cut == "awq")
        if self.cut == "awq":
            mixed = cuts.shuffled(rows, seed)
            return cuts.blocks(mixed, encode, self.samples, length)
        if self.cut in SHUFFLED:
            mixed = cuts.shuffled(rows, seed)
            return cuts.first_documents(mixed, encode, self.samples, length)
        if self.dataset == "c4":
            return cuts.document_windows(rows, encode, self.samples, length, seed)
        tokens = encode_text(tokenizer, corpus.text(tokenizer))
        return cuts.random_windows(tokens, self.samples, length, seed)

    def origin(self) -> dict[str, Any]:
        """What the rows are of, for results."""
        if self.cut != "drawn":
            name = self.text.name if self.text else self.dataset
            return {"name": name, "cut": self.cut, "seed": self.choice_seed}
        text = self.load()
        return {"name": text.name, "sha256": text.sha256, "seed": self.choice_seed}


@dataclass(frozen=True)
class CalibrationOptions(CalibrationText):
    """The text to calibrate with, and how. Evaluate on another one."""

    offload: bool = False
    """Keep activations on the host."""
    resume: Path | None = None
    """A folder for finished blocks, so that a killed run continues."""
    report: Path | None = None
    """Write what happened at every site: JSON lines here, a picture beside it."""
    mesh: MeshOptions = field(default_factory=MeshOptions)

    def check_report(self) -> None:
        """Refuse a report that could not be written once the work is done.

        Raises:
          ValueError: it is a folder, lies in a file, or is named as its picture.
        """
        report = self.report
        if report is None:
            return
        over = next(each for each in report.absolute().parents if each.exists())
        picture = report.with_suffix(".png")
        if report.is_dir() or picture.is_dir() or not over.is_dir():
            raise ValueError(
                f"--calibration.report {report} and {picture.name} beside it cannot be "
                "files: give the name of a file"
            )
        if picture == report:
            raise ValueError(
                f"--calibration.report {report} is the name of its picture: give one "
                "that ends in .jsonl"
            )


def drawn(rows: np.ndarray, samples: int, seed: int) -> np.ndarray:
    """Rows drawn without replacement, in the text's order."""
    count = min(samples, len(rows))
    chosen = np.random.default_rng(seed).choice(len(rows), count, replace=False)
    return rows[np.sort(chosen)]
