"""Mixtral (Jiang et al., 2024): Mistral whose MLPs are mixtures of experts."""

import dataclasses
from typing import Any

from qjax.models import llama, mistral
from qjax.models.fields import Fields
from qjax.models.llama import PREFIX
from qjax.models.names import Name, linear_names
from qjax.models.qwen3_moe import Config, build, chosen_experts

__all__ = ["PREFIX", "build", "from_fields", "names"]

EXPERT = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def from_fields(fields: Fields) -> Config:
    """The configuration in a Hugging Face `config.json`."""
    fields = fields.filled(rope_theta=1e6, rms_norm_eps=1e-5, num_local_experts=8)
    base = mistral.from_fields(fields)
    values: dict[str, Any] = {
        field.name: getattr(base, field.name) for field in dataclasses.fields(base)
    }
    experts, chosen = chosen_experts(fields, "num_local_experts", 2)
    return Config(
        **values,
        experts=experts,
        chosen=chosen,
        expert_features=base.mlp_features,
        renormalise=True,
        sparse=(True,) * base.layers,
    )


def names(config: Config) -> tuple[Name, ...]:
    """The tensors of a Hugging Face checkpoint and the leaves they become."""
    hf, path = "model.layers.{layer}.block_sparse_moe.", "layers/{layer}/mlp/"
    rows = [*llama.outer_names(config), *llama.attention_names(config)]
    rows += linear_names(hf + "gate", path + "router", False)
    for own, short in EXPERT.items():
        expert = f"{hf}experts.{{expert}}.{short}.weight"
        rows.append(Name(expert, f"{path}experts/{own}/kernel", transpose=True))
    return tuple(rows)
