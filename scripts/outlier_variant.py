"""Write a variant of a Llama checkpoint that computes the same and has outliers.

    python scripts/outlier_variant.py --model qjax/models/tiny_llama --out runs/outliers

Large language models have a few channels of activations far larger than the others
(LLM.int8(), SmoothQuant, AWQ exist because of them); small ones have not. Here some
channels of each norm's gain are multiplied by 32 or 64 and the same input columns of
its consumers (q, k, v; gate, up) divided by it; if asked for, also rows of v against
columns of o and rows of up against columns of down. The factors are powers of two, so
every product is what it was, bit for bit and in bf16 too, and outputs differ at most by
the order in which products are summed.
"""

import dataclasses
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from random_llama import Pending, write_shards

from qjax.io.shards import Tensor, open_shards, read_json

KINDS = ("llama", "mistral", "qwen2", "qwen3")
COPIED = ("*.json", "*.model", "*.txt", "*.jinja")
VALUE = "self_attn.v_proj"
# What is scaled, what reads it, and the option that says in how many channels.
PAIRS = (
    (
        "input_layernorm",
        ("self_attn.q_proj", "self_attn.k_proj", VALUE),
        "channels",
    ),
    (VALUE, ("self_attn.o_proj",), "inside"),
    ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj"), "channels"),
    ("mlp.up_proj", ("mlp.down_proj",), "inside"),
)


@dataclasses.dataclass(frozen=True)
class Options:
    """What to scale, and where to write it."""

    model: Path
    """Folder of the original: config, safetensors and tokenizer."""
    out: Path
    """Folder of the variant; it must not hold weights yet."""
    channels: int = 4
    """Channels of each norm's gain that are scaled."""
    factors: tuple[int, ...] = (32, 64)
    """Powers of two; each channel gets one of them."""
    inside: int = 0
    """Channels of each v and each up projection that are scaled."""
    seed: int = 0
    """Seed of the choice of channels and factors."""


@dataclasses.dataclass(frozen=True)
class Scaling:
    """What multiplies a tensor, along one axis of `[out, in]`."""

    factor: np.ndarray
    axis: int


def pick(name: str, size: int, count: int, options: Options) -> np.ndarray:
    """Factors of one producer's `size` output channels: `count` of them are not one.

    Raises:
      ValueError: there are not so many channels.
    """
    if not 0 <= count <= size:
        raise ValueError(f"channels is {count}: {name} has {size}")
    rng = np.random.default_rng([options.seed, zlib.crc32(name.encode())])
    factor = np.ones(size, np.float32)
    chosen = rng.choice(size, count, replace=False)
    factor[chosen] = rng.choice(options.factors, count)
    return factor


def scalings(
    config: Mapping[str, Any], tensors: Mapping[str, Any], options: Options
) -> dict[str, list[Scaling]]:
    """For every tensor that changes, what multiplies it.

    Raises:
      ValueError: the checkpoint lacks a tensor.
    """
    found: dict[str, list[Scaling]] = {}
    for layer in range(config["num_hidden_layers"]):
        for producer, consumers, option in PAIRS:
            name, count = f"model.layers.{layer}.{producer}", getattr(options, option)
            if name + ".weight" not in tensors:
                raise ValueError(f"{options.model} has no tensor {name}.weight")
            factor = pick(name, tensors[name + ".weight"].shape[0], count, options)
            changes = {name + ".weight": Scaling(factor, 0)}
            changes[name + ".bias"] = Scaling(factor, 0)
            inputs = repeated(factor, config) if producer == VALUE else factor
            for consumer in consumers:
                weight = f"model.layers.{layer}.{consumer}.weight"
                changes[weight] = Scaling(1 / inputs, 1)
            for each, change in changes.items() if count else ():
                if each in tensors:
                    found.setdefault(each, []).append(change)
    return found


def repeated(factor: np.ndarray, config: Mapping[str, Any]) -> np.ndarray:
    """Factors of the value heads, once for each query head that reads them."""
    heads, values = config["num_attention_heads"], config["num_key_value_heads"]
    return np.repeat(factor.reshape(values, -1), heads // values, 0).reshape(-1)


def scaled(tensor: Tensor, changes: list[Scaling]) -> Pending:
    """The tensor with its changes, computed when it is read."""

    def read() -> np.ndarray:
        out = np.asarray(tensor.view(), np.float32)
        for change in changes:
            shape = [1] * out.ndim
            shape[change.axis] = -1
            out = out * change.factor.reshape(shape)
        return out.astype(tensor.dtype)

    return Pending(tensor.shape, np.dtype(tensor.dtype), read)


def check(config: Mapping[str, Any], options: Options) -> None:
    """Refuse what cannot be done exactly.

    Raises:
      ValueError: another architecture, or factors that are not powers of two.
    """
    if config.get("model_type") not in KINDS:
        raise ValueError(
            f"model_type is {config.get('model_type')!r}, supported are "
            + ", ".join(KINDS)
        )
    if any(f < 1 or f & (f - 1) for f in options.factors) or not options.factors:
        raise ValueError(f"factors are {options.factors}: each must be a power of two")


def main(options: Options) -> None:
    """Write the variant."""
    config = read_json(options.model / "config.json")
    check(config, options)
    tensors = open_shards(options.model)
    changes = scalings(config, tensors, options)
    leaves = {name: scaled(t, changes.get(name, [])) for name, t in tensors.items()}
    write_shards(options.out, leaves, shard_bytes=1 << 30)
    for pattern in COPIED:
        for path in options.model.glob(pattern):
            if not path.name.endswith(".index.json"):
                shutil.copy(path, options.out / path.name)
    print(f"{options.out}: {len(changes)} of {len(tensors)} tensors scaled")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
