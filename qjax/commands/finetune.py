"""`qjax finetune`: LoRA or QLoRA, written as a folder that PEFT loads."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
import tyro

from qjax.commands.inputs import Model, computing, open_model
from qjax.commands.output import wide_console
from qjax.commands.training import TrainingOptions, check_same_job, run_training
from qjax.core.formats import Codebook
from qjax.core.qtensor import is_quantized
from qjax.core.sweep import second_scale
from qjax.io.export import export
from qjax.methods.loftq import LoftQ
from qjax.methods.lqer import LQER
from qjax.methods.qera import QERA
from qjax.methods.rtn import RTN
from qjax.quantize import quantize
from qjax.schemes import scheme
from qjax.train import PiSSA, initialise_lora, lora, save_peft
from qjax.train.lora import Adapters
from qjax.train.step import TrainState, begin, next_token_loss, training_step

STARTS = {"loftq": LoftQ, "lqer": LQER, "qera": QERA}
SEEN = 128  # windows that a start by activations sees


@dataclass(frozen=True)
class Finetune:
    """Train low-rank adapters beside frozen weights.

    OUT is a PEFT folder: adapter_config.json and adapter_model.safetensors. A start
    that codes the weights also writes OUT.base, the model that the adapters belong to.
    """

    model: Annotated[str, tyro.conf.Positional]
    """A Hugging Face folder, one `qjax quantize` wrote, a hub id, or "bundled"."""
    out: Annotated[Path, tyro.conf.Positional]
    """The folder to write; it must not exist."""
    scheme: str | None = None
    """Quantize the frozen weights: NF4_DQ is QLoRA's (None: as they are)."""
    rank: int = 16
    """Rank of the adapters."""
    alpha: float = 16.0
    """Their scale is alpha over rank."""
    dropout: float = 0.0
    """Of the adapters' inputs."""
    rslora: bool = False
    """Scale by alpha over the root of rank."""
    dora: bool = False
    """Learn a magnitude for each output feature."""
    start: Literal["pissa", "loftq", "lqer", "qera"] | None = None
    """Start the adapters from the largest singular values of the weights (pissa), or
    from what --scheme loses of them (loftq), seen by the first 128 windows of the text
    (lqer, qera), in place of zero."""
    targets: tuple[str, ...] = ()
    """Patterns of the linears to adapt (all but the head)."""
    training: tyro.conf.OmitArgPrefixes[TrainingOptions] = field(
        default_factory=TrainingOptions
    )

    def run(self) -> None:
        """Train and save."""
        self._check()
        goes_on = check_same_job(self)
        self.training.mesh()  # refused before anything is computed
        coded = self.scheme is not None
        needs_float = coded or self.start is not None
        model = open_model(self.model, in_float=needs_float)
        data, optimiser = self.training.rows(model), self.training.optimiser()
        params, start = self._frozen(model, data[0])
        exported = start is not None and coded
        base = str(model.folder)
        if exported:
            base = self._write_base(model, params, goes_on)
        if self.training.precision is not None:
            params = computing(params, self.training.precision)
        f_lora, adapters = self._lora(model, params)
        if start is not None:
            adapters = replace(adapters, leaves=start.leaves, base=start.base)

        def loss(own: Any, carried: Any, tokens: Any, key: Any, frozen: Any) -> Any:
            logits = f_lora(own, frozen, tokens, key=key)
            return next_token_loss(logits, tokens), carried

        def held_out_loss(state: TrainState, tokens: Any, frozen: Any) -> Any:
            return loss(state.trained, None, tokens, None, frozen)[0]

        state = run_training(
            self,
            f"{model.name}: LoRA of rank {self.rank}, {self.scheme or 'float'}",
            training_step(loss, optimiser),
            begin(adapters, optimiser),
            held_out_loss,
            data,
            (params,),
        )
        raw = json.loads((model.folder / "config.json").read_text(encoding="utf-8"))
        trained = state.trained
        if start is not None:  # whose places say how weights were stored
            trained = replace(trained, places=start.places)
        save_peft(
            self.out,
            trained,
            raw["model_type"],
            model.config,
            base,
            start=None if exported else start,
            exported=exported,
        )
        wide_console().print(f"wrote {self.out}: {_share(params, adapters)}")

    def _check(self) -> None:
        """Refuse, before anything is computed, what would fail after it."""
        if self.out.exists():
            raise FileExistsError(f"{self.out} exists; give the name of a new folder")
        if self.start in STARTS and self.scheme is None:
            raise ValueError(
                f"--start {self.start} makes up for what coding loses: give --scheme, "
                "such as NF4"
            )
        formats = None if self.scheme is None else scheme(self.scheme)
        if self.start is not None and formats and second_scale(formats.weights):
            raise ValueError(
                f"--scheme {self.scheme} has a scale that linears with one input "
                "share, and --start splits each by itself: give another scheme"
            )
        if self.start == "pissa" and formats and formats.activations is not None:
            raise ValueError(
                f"--scheme {self.scheme} codes inputs, which --start pissa does not: "
                "give a scheme of weights alone, such as NF4"
            )
        if self.start is not None and self.dora:
            raise ValueError(
                "--dora starts from the weights as they are: leave out --start"
            )

    def _lora(self, model: Model, params: Any) -> tuple[Any, Adapters]:
        return lora(
            model.f,
            params,
            self.rank,
            self.alpha,
            self.targets or None,
            self.dropout,
            example=model.example,
            key=self.training.key(),
            rslora=self.rslora,
            dora=self.dora,
        )

    def _frozen(self, model: Model, rows: np.ndarray) -> tuple[Any, Adapters | None]:
        """What is not trained, and the adapters that start beside it."""
        coded = params = model.params
        if self.scheme is not None:
            recipe = RTN(self.scheme)
            coded = quantize(model.f, params, recipe, example=model.example)
        if self.start is None:
            return coded, None
        formats = None if self.scheme is None else scheme(self.scheme)
        if self.start == "pissa":
            split = PiSSA(formats and formats.weights)
        else:
            split = STARTS[self.start](self.scheme)
        size = self.training.batch
        rows = rows[:SEEN]
        seen = [(rows[i : i + size],) for i in range(0, len(rows), size)]
        adapters, started = initialise_lora(
            model.f, params, self._lora(model, params)[1], split, seen
        )
        if self.scheme is None:
            return started, adapters
        # Where there is no adapter, weights are coded as without a start.
        return jax.tree.map(
            lambda own, other: own if is_quantized(own) else other,
            started,
            coded,
            is_leaf=is_quantized,
        ), adapters

    def _write_base(self, model: Model, params: Any, goes_on: bool) -> str:
        """The coded model, in the checkpoint format that has a place for its codes.

        A job that goes on finds the one that it wrote.
        """
        path = self.out.with_name(self.out.name + ".base")
        if path.exists() and not goes_on:
            raise FileExistsError(
                f"{path} exists, of another job or one that made no checkpoint: remove "
                "it, or give another OUT"
            )
        if not path.exists():
            levels = isinstance(scheme(str(self.scheme)).weights, Codebook)
            kind = "bitsandbytes" if levels else "compressed-tensors"
            export(path, params, model=model.folder, format=kind, base=model.name)
            wide_console().print(f"wrote {path}, to which the adapters will belong")
        return str(path.resolve())


def _share(params: Any, adapters: Any) -> str:
    trained = sum(x.size for x in jax.tree.leaves(adapters))
    whole = sum(x.size for x in jax.tree.leaves(params, is_leaf=is_quantized))
    return f"{trained} trained parameters, {trained / whole:.2%} of the model's"
