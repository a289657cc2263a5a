"""What calibrating subcommands take: a text to calibrate with, and where to run."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qjax.commands.inputs import Model, TextOptions
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
                f"--mesh.processes is {self.processes}: give --mesh.coordinator too"
            )
        if self.coordinator is not None:
            jax.distributed.initialize(self.coordinator, self.processes, self.process)
        if self.data * self.model == 1:
            return None
        if self.data * self.model != jax.device_count():
            raise ValueError(
                f"--mesh.data {self.data} times --mesh.model {self.model} must be the "
                f"number of devices, {jax.device_count()}"
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
    """A UTF-8 text file, in place of a dataset."""
    dataset: str | None = None
    """A named text: pydoc (the default, offline), wikitext2, c4 or ptb."""
    samples: int = 128
    """Windows to calibrate with, drawn at random; fewer if the text is short."""
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
        text = self.load()
        tokens = encode_text(model.tokenizer, text)
        length = min(self.length, getattr(model.config, "context", None) or self.length)
        if evaluated is not None and evaluated[0].sha256 == text.sha256:
            tokens = tokens[evaluated[1] :]
            if tokens.size < length:
                raise ValueError(
                    f"{text.name} is evaluated, and only {tokens.size} tokens of it are"
                    " left to calibrate with: give another --calibration.text or "
                    "--calibration.dataset"
                )
        return drawn(
            windows(tokens, length).tokens, self.samples, self.batch, self.seed
        )


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


def drawn(
    rows: np.ndarray, samples: int, batch: int, seed: int
) -> list[tuple[np.ndarray, ...]]:
    """Batches of rows drawn without replacement, in the text's order."""
    count = min(samples, len(rows))
    chosen = np.random.default_rng(seed).choice(len(rows), count, replace=False)
    rows = rows[np.sort(chosen)]
    return [(rows[i : i + batch],) for i in range(0, count, batch)]
