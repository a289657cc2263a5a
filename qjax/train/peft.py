"""Adapters as a folder that PEFT loads: adapter_config.json and safetensors.

https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

import json
import os
from dataclasses import replace
from math import sqrt
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from qjax.io.folder import published
from qjax.models import architecture
from qjax.train.lora import Adapters, LoRA, Place

PREFIX = "base_model.model."


def save_peft(
    path: str | os.PathLike[str],
    adapters: Adapters,
    model_type: str,
    config: Any,
    base_model: str = "",
    *,
    start: Adapters | None = None,
    exported: bool = False,
) -> Path:
    """Write adapters as PEFT does.

    Adapters that `initialise_lora` started belong to the parameters that it returned.
    Those beside a rest in float (`PiSSA()`) become adapters of the original model,
    `s (A B - A_0 B_0)`, which have twice the rank, as PEFT's own conversion writes them
    (`path_initial_model_for_weight_conversion`): give `start`. Those beside codes
    belong to the quantized model that `qjax.export` writes: say `exported`.

    Args:
      path: a folder that does not exist yet.
      adapters: as trained.
      model_type: of the base model's `config.json`, such as "llama".
      config: the base model's configuration, as `load_model` gives it.
      base_model: `base_model_name_or_path`, the base model's folder or hub id.
      start: the adapters as `initialise_lora` returned them, before training.
      exported: whether `base_model` holds the parameters that `initialise_lora`
        returned.

    Returns:
      The folder's path.

    Raises:
      FileExistsError: the folder exists.
      ValueError: an adapted leaf is no single linear of the checkpoint, or it is not
        said to which model the adapters belong.
    """
    path = Path(path).resolve()
    if path.exists():
        raise FileExistsError(f"{path} exists; give the name of a new folder")
    _check_base(adapters, base_model, start, exported)
    if start is not None:
        adapters = _of_the_original(adapters, start)
    modules = _modules(architecture(model_type), config)
    tensors: dict[str, np.ndarray] = {}
    names: list[str] = []
    for leaf, place in adapters.places:
        for name, factors in _layers(place, adapters.leaves[leaf]):
            module = modules.get(name)
            if module is None or place.layout.batch_axes:
                raise ValueError(
                    f"{name} is no single linear of a {model_type} checkpoint; PEFT "
                    "has no place for its adapter"
                )
            names.append(module)
            tensors |= _tensors(module, factors)
    body = _config(adapters.config, names, base_model)
    with published(path) as folder:
        text = json.dumps(body, indent=2, sort_keys=True) + "\n"
        (folder / "adapter_config.json").write_text(text, encoding="utf-8")
        file = folder / "adapter_model.safetensors"
        save_file(tensors, file, metadata={"format": "pt"})
    return path


def _check_base(
    adapters: Adapters, base_model: str, start: Adapters | None, exported: bool
) -> None:
    """Refuse adapters of which it is not clear beside which weights they stand."""
    if adapters.base == "codes" and not exported:
        raise ValueError(
            "the adapters stand beside the codes that initialise_lora made, not beside "
            "the original weights: write those with qjax.export, give that folder as "
            "base_model, and exported=True"
        )
    if adapters.base == "rest" and exported == (start is not None):
        raise ValueError(
            "the adapters stand beside what initialise_lora left of the weights: give "
            "either start, the adapters that it returned, or a base_model that holds "
            "these weights and exported=True"
        )
    if exported and not base_model:
        raise ValueError("exported=True needs base_model, the exported model's folder")
    if start is None:
        return
    if adapters.base != "rest":
        raise ValueError("start is for adapters beside a rest in float, as of PiSSA()")
    if (start.config, start.places) != (adapters.config, adapters.places):
        raise ValueError("start holds other adapters than those to be written")


def _of_the_original(adapters: Adapters, start: Adapters) -> Adapters:
    """Adapters of twice the rank, beside the weights that were there before."""
    join = lambda *x, axis: np.concatenate([np.asarray(each) for each in x], axis)
    leaves = {
        path: {
            "a": join(own["a"], start.leaves[path]["a"], axis=-1),
            "b": join(own["b"], -start.leaves[path]["b"], axis=-2),
        }
        for path, own in adapters.leaves.items()
    }
    config = adapters.config
    # The scaling stays as it is, over a rank that is twice as large.
    alpha = config.alpha * (sqrt(2) if config.rslora else 2)
    config = replace(config, rank=2 * config.rank, alpha=alpha)
    return replace(adapters, leaves=leaves, config=config, base="given")


def _modules(module: ModuleType, config: Any) -> dict[str, str]:
    """The checkpoint's module for each linear, by the name that patterns see."""
    found = {}
    for row in module.names(config):
        if not row.transpose or "{expert}" in row.hf:
            continue
        for layer in range(config.layers if "{layer}" in row.path else 1):
            hf = row.hf.format(layer=layer).removesuffix(".weight")
            found[row.path.format(layer=layer)] = hf
    return found


def _layers(place: Place, factors: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Each layer's name and factors."""
    if not place.layers:
        return [(place.names[0], factors)]
    flat = jax.tree.map(
        lambda x: np.asarray(x).reshape(-1, *x.shape[len(place.layers) :]), factors
    )
    return [
        (name, jax.tree.map(lambda x, i=i: x[i], flat))
        for i, name in enumerate(place.names)
    ]


def _tensors(module: str, factors: dict[str, Any]) -> dict[str, np.ndarray]:
    """PEFT keeps `A` as `[r, in]` and `B` as `[out, r]`."""
    name = PREFIX + module
    tensors = {
        f"{name}.lora_A.weight": _row_major(factors["a"].T),
        f"{name}.lora_B.weight": _row_major(factors["b"].T),
    }
    if "magnitude" in factors:
        tensors[f"{name}.lora_magnitude_vector"] = _row_major(factors["magnitude"])
    return tensors


def _row_major(x: Any) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(x, np.float32))


def _config(config: LoRA, names: list[str], base_model: str) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model or None,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.rslora,
        "use_dora": config.dora,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "target_modules": sorted(names),
    }
