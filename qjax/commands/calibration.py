"""What calibrating subcommands take: a text to calibrate with, and where to run."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from qjax import cuts
from qjax.commands.inputs import Model, TextOptions
from qjax.corpora import encoder, load_corpus
from qjax.data import Text, encode_text, windows


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
    cut: Literal["drawn", "gptq", "awq"] = "drawn"
    """How windows are cut: side by side, some of them drawn; at random places of the
    text, as GPTQ; or out of short documents in random order, joined, as AWQ."""
    samples: int = 128
    """Windows (with awq, documents) to calibrate with, drawn at random; fewer if the
    text is short."""
    length: int = 512
    """Tokens in a window, at most the model's context."""
    batch: int = 4
    """Windows in a batch."""
    seed: int = 0
    """Of the choice of windows, and of what methods draw."""

    def load(self) -> Text:
        """The text. Raises ValueError if two are asked for, OSError if none is had."""
        dataset: Any = self.dataset
        return TextOptions(text=self.text, dataset=dataset).load()

    def batches(
        self, model: Model, evaluated: tuple[Text, int] | None = None
    ) -> list[tuple[np.ndarray, ...]]:
        """The batches.

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
        if self.cut != "drawn":
            return self._batched(self._cut(model.tokenizer, length, evaluated))
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
            drawn(windows(tokens, length).tokens, self.samples, self.seed)
        )

    def _batched(self, rows: np.ndarray) -> list[tuple[np.ndarray, ...]]:
        return [(rows[i : i + self.batch],) for i in range(0, len(rows), self.batch)]

    def _cut(
        self, tokenizer: Any, length: int, evaluated: tuple[Text, int] | None
    ) -> np.ndarray:
        """Rows as GPTQ or AWQ cut them."""
        if (self.text is None) == (self.dataset is None):
            raise ValueError(
                f"--calibration.cut {self.cut} needs one of --calibration.text and "
                "--calibration.dataset"
            )
        if evaluated is not None and self.text and evaluated[0].name == self.text.name:
            raise ValueError(
                f"{self.text} is evaluated: give another --calibration.text"
            )
        corpus = load_corpus(self.text or str(self.dataset))
        rows: Any = corpus.rows
        if self.cut == "awq":
            encode, mixed = (
                encoder(tokenizer, strip=True),
                cuts.shuffled(rows, self.seed),
            )
            return cuts.blocks(mixed, encode, self.samples, length)
        if self.dataset == "c4":
            encode = encoder(tokenizer)
            return cuts.document_windows(rows, encode, self.samples, length, self.seed)
        tokens = encode_text(tokenizer, corpus.text(tokenizer))
        return cuts.random_windows(tokens, self.samples, length, self.seed)

    def origin(self) -> dict[str, Any]:
        """What the rows are of, for results."""
        if self.cut != "drawn":
            name = self.text.name if self.text else self.dataset
            return {"name": name, "cut": self.cut, "seed": self.seed}
        text = self.load()
        return {"name": text.name, "sha256": text.sha256, "seed": self.seed}


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


def drawn(rows: np.ndarray, samples: int, seed: int) -> np.ndarray:
    """Rows drawn without replacement, in the text's order."""
    count = min(samples, len(rows))
    chosen = np.random.default_rng(seed).choice(len(rows), count, replace=False)
    return rows[np.sort(chosen)]
