"""`qjax qat`: train a model quantized, and save it as `qjax quantize` does."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from qjax.commands.inputs import open_model
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
    fake_quantize,
    finalize,
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
    targets: tuple[str, ...] = ()
    """Patterns of the weights to quantize (all but the head)."""
    ignore: tuple[str, ...] = ()
    """Patterns of the weights to leave in float."""
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
        data, optimiser = self.training.rows(model), self.training.optimiser()
        f_qat, qstate = fake_quantize(
            model.f, model.params, step, example=model.example
        )

        def loss(trained: Any, observed: Any, tokens: Any, key: Any) -> Any:
            own = replace(qstate, trained=trained["qstate"], observed=observed)
            logits, after = f_qat(trained["params"], own, tokens, key=key)
            return next_token_loss(logits, tokens), after.observed

        def held_out_loss(state: TrainState, tokens: Any) -> Any:
            return loss(state.trained, state.carried, tokens, None)[0]

        trained = {"params": model.params, "qstate": qstate.trained}
        state = run_training(
            self.training,
            self.out,
            f"{model.name}: {self.method}, {step.weights.weight_format.name}",
            training_step(loss, optimiser),
            begin(trained, optimiser, qstate.observed),
            held_out_loss,
            data,
            (),
        )
        done = replace(qstate, trained=state.trained["qstate"], observed=state.carried)
        save(
            self.out,
            finalize(state.trained["params"], done),
            metadata={
                "model": model.name,
                "scan_layers": model.scan_layers,
                "trained": repr(step),
            },
            files=shell_files(model.folder),
            overwrite=self.overwrite,
        )
        wide_console().print(f"wrote {self.out}")

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
