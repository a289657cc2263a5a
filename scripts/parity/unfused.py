"""Experts of a transformers model as linears of their own, as checkpoints keep them.

transformers 5 holds the experts of a layer in two parameters, and joins them while it
reads a checkpoint. Quantized ones it decodes on the way: of compressed-tensors it takes
the packed weights and their first scale, or whole float8 weights, and nothing else, so
that second scales, zero points and coded inputs are lost; for other formats it has no
place. `experts_as_linears` gives every expert its three linears back, under the names
that checkpoints have; every reader then treats them like any other linear of the model.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.models.mixtral import modeling_mixtral
from transformers.models.qwen3_moe import modeling_qwen3_moe

# The block that holds the experts, and their linears' names: gate, up, down.
BLOCKS: dict[str, tuple[Any, tuple[str, str, str]]] = {
    "mixtral": (modeling_mixtral.MixtralSparseMoeBlock, ("w1", "w3", "w2")),
    "qwen3_moe": (
        modeling_qwen3_moe.Qwen3MoeSparseMoeBlock,
        ("gate_proj", "up_proj", "down_proj"),
    ),
}


class Expert(nn.Module):
    """`down(act(gate(x)) * up(x))`."""

    def __init__(self, fused: Any, names: tuple[str, str, str]) -> None:
        super().__init__()
        self.act_fn, self.names = fused.act_fn, names
        wide, narrow = fused.intermediate_dim, fused.hidden_dim
        for name, (K, N) in zip(
            names, ((narrow, wide), (narrow, wide), (wide, narrow)), strict=True
        ):
            setattr(self, name, nn.Linear(K, N, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up, down = (getattr(self, name) for name in self.names)
        return down(self.act_fn(gate(x)) * up(x))


class Experts(nn.ModuleList):
    """The experts of a layer; each sees the tokens that the router sends it."""

    def forward(
        self, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        y = torch.zeros_like(x)
        for index, expert in enumerate(self):
            token, place = torch.where(chosen == index)
            if token.numel():
                # compressed-tensors gives tokens without a batch one scale for all.
                part = expert(x[token][None])[0] * weights[token, place, None]
                y.index_add_(0, token, part.to(y.dtype))
        return y


@contextmanager
def experts_as_linears() -> Iterator[None]:
    """Within it, models are built and read with them."""
    mappings = conversion_mapping
    renamed = [WeightRenaming(".block_sparse_moe.", ".mlp.")]
    with ExitStack() as undone:
        for kind, (block, names) in BLOCKS.items():
            undone.callback(setattr, block, "__init__", block.__init__)
            undone.callback(
                mappings.register_checkpoint_conversion_mapping,
                kind,
                mappings.get_checkpoint_conversion_mapping(kind),
                overwrite=True,
            )
            block.__init__ = _building(block.__init__, names)
            mappings.register_checkpoint_conversion_mapping(
                kind, renamed if kind == "mixtral" else [], overwrite=True
            )
        yield


def _building(built: Callable[..., None], names: tuple[str, str, str]) -> Any:
    def build(self: Any, config: Any) -> None:
        built(self, config)
        fused = self.experts
        each = [Expert(fused, names) for _ in range(fused.num_experts)]
        self.experts = Experts(each)

    return build


def with_module_names(folder: Path, out: Path) -> Path:
    """A copy, in `out`, under the names of transformers 5.

    Of older names it knows those of weights alone. Mixtral's `block_sparse_moe` is
    `mlp` there; config.json may name modules too.
    """
    out.mkdir()
    for file in folder.glob("*.json"):
        shutil.copyfile(file, out / file.name)
    config = (folder / "config.json").read_text().replace("block_sparse_moe", "mlp")
    (out / "config.json").write_text(config)
    tensors = load_file(folder / "model.safetensors")
    renamed = {k.replace("block_sparse_moe", "mlp"): v for k, v in tensors.items()}
    save_file(renamed, out / "model.safetensors", {"format": "pt"})
    return out


def has_experts(folder: Path) -> bool:
    """Whether a folder's model is one of those."""
    return json.loads((folder / "config.json").read_text())["model_type"] in BLOCKS
