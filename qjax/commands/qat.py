"""`qjax qat`: train a model quantized, and save it as `qjax quantize` does."""

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
import tyro

from qjax.commands.inputs import Model, computing, open_model
from qjax.commands.output import wide_console
from qjax.commands.quantize import shell_files
from qjax.commands.training import TrainingOptions, run_training
from qjax.core.formats import Int, channel, group, token
from qjax.io.checkpoint import check_target, save
from qjax.train import (
    LSQ,
    QAT,
    BitNet,
    ParetoQ,
    StraightThrough,
    distillation_loss,
    fake_quantize,
    finalize,
    generated_rows,
    quantize_kv,
)
from qjax.train.step import TrainState, begin, next_token_loss, training_step


@dataclass(frozen=True)
class TrainQuantized:
    """Quantization-aware training.

    OUT holds the quantized weights and the configuration and tokenizer of MODEL.
    """

    model: Annotated[str, tyro.conf.Positional]
    """A local Hugging Face folder, a hub id, or "bundled"."""
    out: Annotated[Path, tyro.conf.Positional]
    """The folder to write; it must not exist, unless --overwrite."""
    method: Literal["lsq", "paretoq", "ste", "bitnet"] = "lsq"
    """For the weights: learned steps, ParetoQ, straight-through, or BitNet b1.58."""
    bits: int = 4
    """Bits of the weights (bitnet: always 1.58)."""
    group_size: int | None = None
    """Weights that share a scale (None: all of an output feature)."""
    activation_bits: int | None = None
    """Bits of the activations, with a range for each token (None: float)."""
    kv_bits: int | None = None
    """Bits of keys and values, with a range for each token and head (None: float)."""
    targets: tuple[str, ...] = ()
    """Patterns of the weights to quantize (all but the head)."""
    ignore: tuple[str, ...] = ()
    """Patterns of the weights to leave in float."""
    teacher: str | None = None
    """Learn the logits of this float model, not the text: a folder, a hub id,
    "bundled", or "self" for MODEL as it was."""
    data: Literal["text", "generated"] = "text"
    """Train on a text, or without data on what the teacher, or MODEL, writes (with
    --teacher: LLM-QAT)."""
    windows: int = 2048
    """Windows to generate."""
    overwrite: bool = False
    """Replace OUT, if qjax wrote it."""
    training: tyro.conf.OmitArgPrefixes[TrainingOptions] = field(
        default_factory=TrainingOptions
    )

    def run(self) -> None:
        """Train, finalize and save."""
        step = self.step()
        check_target(self.out, self.overwrite, "--overwrite")
        model = open_model(self.model, in_float=True)
        teacher = self.open_teacher(model)
        data, optimiser = self.rows(model, teacher), self.training.optimiser()
        seen = partial(self.training.computing, stored=model.params)
        f = model.f if self.kv_bits is None else quantize_kv(model.f, self.kv_bits)
        f_qat, qstate = fake_quantize(
            f, seen(model.params), step, example=model.example
        )

        def run(trained: Any, observed: Any, tokens: Any, key: Any) -> Any:
            own = replace(qstate, trained=trained["qstate"], observed=observed)
            return f_qat(seen(trained["params"]), own, tokens, key=key)

        def loss(trained: Any, observed: Any, tokens: Any, key: Any, known: Any) -> Any:
            logits, after = run(trained, observed, tokens, key)
            if teacher is None:
                return next_token_loss(logits, tokens), after.observed
            wanted = teacher.f(known, tokens)
            return distillation_loss(logits, wanted), after.observed

        def held_out_loss(state: TrainState, tokens: Any, known: Any) -> Any:
            logits, _ = run(state.trained, state.carried, tokens, None)
            return next_token_loss(logits, tokens)

        start = computing(model.params, "float32")
        trained = {"params": start, "qstate": qstate.trained}
        state = run_training(
            self,
            f"{model.name}: {self.method}, {step.weights.weight_format.name}",
            training_step(loss, optimiser),
            begin(trained, optimiser, qstate.observed),
            held_out_loss,
            data,
            (None if teacher is None else self.known(teacher),),
        )
        done = replace(qstate, trained=state.trained["qstate"], observed=state.carried)
        save(
            self.out,
            finalize(seen(state.trained["params"]), done),
            metadata={
                "model": model.name,
                "scan_layers": model.scan_layers,
                "trained": repr(step),
                "kv_bits": self.kv_bits,
            },
            files=shell_files(model.folder),
            overwrite=self.overwrite,
        )
        wide_console().print(f"wrote {self.out}")

    def known(self, teacher: Model) -> Any:
        """The teacher's parameters as the forward pass sees them."""
        return self.training.computing(teacher.params, teacher.params)

    def open_teacher(self, model: Model) -> Model | None:
        """The model whose logits are learned.

        Raises:
          ValueError: its tokens are not those of `model`.
        """
        if self.teacher is None or self.teacher == "self":
            return None if self.teacher is None else model
        teacher = open_model(self.teacher, in_float=True)
        sizes = [each.config.vocabulary for each in (teacher, model)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"--teacher {self.teacher} has {sizes[0]} tokens, but {model.name} has "
                f"{sizes[1]}: give a teacher with the same tokenizer"
            )
        return teacher

    def rows(
        self, model: Model, teacher: Model | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Windows to train on, and held-out ones.

        Raises:
          ValueError: a text is too short or named beside generated data, or the model
            has no tokenizer.
        """
        options = self.training
        if self.data == "text":
            return options.rows(model)
        if options.text is not None or options.dataset is not None:
            raise ValueError(
                "--data generated needs no text: leave out --text and --dataset"
            )
        writer = model if teacher is None else teacher
        rows = generated_rows(
            writer.f,
            writer.params,
            model.config.vocabulary,
            self.windows + options.held_out,
            min(options.length, getattr(model.config, "context", options.length)),
            jax.random.fold_in(options.key(), 1),
        )
        return rows[: -options.held_out], rows[-options.held_out :]

    def step(self) -> QAT:
        """The recipe that the options describe."""
        size = channel() if self.group_size is None else group(self.group_size)
        methods = {
            "lsq": lambda: LSQ(self.bits, size),
            "paretoq": lambda: ParetoQ(self.bits, size),
            "ste": lambda: StraightThrough(Int(self.bits, size)),
            "bitnet": BitNet,
        }
        inputs = None
        if self.activation_bits is not None:
            narrow = Int(self.activation_bits, token(), scale_rule="narrow")
            inputs = StraightThrough(narrow)
        weights = methods[self.method]()
        return QAT(weights, inputs, self.targets or None, self.ignore)
