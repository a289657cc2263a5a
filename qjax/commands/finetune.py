"""`qjax finetune`: LoRA or QLoRA, written as a folder that PEFT loads."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro

from qjax.commands.inputs import computing, open_model
from qjax.commands.output import wide_console
from qjax.commands.training import TrainingOptions, run_training
from qjax.core.qtensor import is_quantized
from qjax.methods.rtn import RTN
from qjax.quantize import quantize
from qjax.train import lora, save_peft
from qjax.train.step import TrainState, begin, next_token_loss, training_step


@dataclass(frozen=True)
class Finetune:
    """Train low-rank adapters beside frozen weights.

    OUT is a PEFT folder: adapter_config.json and adapter_model.safetensors.
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
    targets: tuple[str, ...] = ()
    """Patterns of the linears to adapt (all but the head)."""
    training: tyro.conf.OmitArgPrefixes[TrainingOptions] = field(
        default_factory=TrainingOptions
    )

    def run(self) -> None:
        """Train and save."""
        if self.out.exists():
            raise FileExistsError(f"{self.out} exists; give the name of a new folder")
        model = open_model(self.model, in_float=self.scheme is not None)
        data, optimiser = self.training.rows(model), self.training.optimiser()
        params = model.params
        if self.scheme is not None:
            recipe = RTN(self.scheme)
            params = quantize(model.f, params, recipe, example=model.example)
        if self.training.precision is not None:
            params = computing(params, self.training.precision)
        f_lora, adapters = lora(
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

        def loss(own: Any, carried: Any, tokens: Any, key: Any, frozen: Any) -> Any:
            logits = f_lora(own, frozen, tokens, key=key)
            return next_token_loss(logits, tokens), carried

        def held_out_loss(state: TrainState, tokens: Any, frozen: Any) -> Any:
            return loss(state.trained, None, tokens, None, frozen)[0]

        state = run_training(
            self.training,
            self.out,
            f"{model.name}: LoRA of rank {self.rank}, {self.scheme or 'float'}",
            training_step(loss, optimiser),
            begin(adapters, optimiser),
            held_out_loss,
            data,
            (params,),
        )
        raw = json.loads((model.folder / "config.json").read_text(encoding="utf-8"))
        base = str(model.folder)
        save_peft(self.out, state.trained, raw["model_type"], model.config, base)
        wide_console().print(f"wrote {self.out}: {_share(params, adapters)}")


def _share(params: Any, adapters: Any) -> str:
    trained = sum(x.size for x in jax.tree.leaves(adapters))
    whole = sum(x.size for x in jax.tree.leaves(params, is_leaf=is_quantized))
    return f"{trained} trained parameters, {trained / whole:.2%} of the model's"
