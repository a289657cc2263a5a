"""Write a Llama with random weights as a Hugging Face folder, for timing and memory.

    python scripts/random_llama.py --size 3b --out runs/random_llama_3b

Shapes of Llama 3 (1b, 3b, 8b) and smaller ones of the same kind; sharded bf16
safetensors and `config.json`, no tokenizer. Tensors are drawn and written one by one,
each from a generator of its own, so that memory holds one tensor, whatever the size,
and a folder depends on the sizes and the seed alone.
"""

import dataclasses
import json
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
import tyro

from qjax.io.arrays import write_arrays
from qjax.io.shards import INDEX, SINGLE

CHUNK = 1 << 24  # numbers drawn at a time


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes in `config.json`, under its names."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    head_dim: int
    tie_word_embeddings: bool = True


SIZES = {
    "mini": Sizes(64, 64, 1, 2, 1, 32, 32),
    "tiny": Sizes(128, 256, 2, 4, 2, 256, 32),
    "100m": Sizes(768, 3072, 10, 12, 4, 8192, 64),
    "300m": Sizes(1024, 4096, 16, 16, 8, 32000, 64),
    "1b": Sizes(2048, 8192, 16, 32, 8, 128256, 64),
    "3b": Sizes(3072, 8192, 28, 24, 8, 128256, 128),
    "8b": Sizes(4096, 14336, 32, 32, 8, 128256, 128, False),
}


@dataclasses.dataclass(frozen=True)
class Pending:
    """A tensor that is made when it is written."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Options:
    """What to write, and where."""

    out: Path
    """The folder; it must not hold weights yet."""
    size: Literal["mini", "tiny", "100m", "300m", "1b", "3b", "8b"] = "1b"
    """Shapes of Llama 3.2 1B and 3B and Llama 3 8B; the others are smaller."""
    tied: bool | None = None
    """Whether the embedding is also the head; without it, as in the original."""
    seed: int = 0
    """Seed of the weights."""
    shard_bytes: int = 1 << 30
    """A file is closed when the next tensor would make it larger."""


def shapes(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint, `[out, in]`, in the order it is written."""
    hidden, inner = sizes.hidden_size, sizes.intermediate_size
    wide = sizes.num_attention_heads * sizes.head_dim
    narrow = sizes.num_key_value_heads * sizes.head_dim
    block = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (wide, hidden),
        "self_attn.k_proj": (narrow, hidden),
        "self_attn.v_proj": (narrow, hidden),
        "self_attn.o_proj": (hidden, wide),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (sizes.vocab_size, hidden)
    }
    for layer in range(sizes.num_hidden_layers):
        for name, shape in block.items():
            found[f"model.layers.{layer}.{name}.weight"] = shape
    found["model.norm.weight"] = (hidden,)
    if not sizes.tie_word_embeddings:
        found["lm_head.weight"] = (sizes.vocab_size, hidden)
    return found


def draw(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """One tensor in bf16: gains of one, embeddings of 0.02, matrices of 1/sqrt(K)."""
    if len(shape) == 1:
        return np.ones(shape, ml_dtypes.bfloat16)
    std = np.float32(0.02 if "embed_tokens" in name else shape[1] ** -0.5)
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    out = np.empty(shape, ml_dtypes.bfloat16)
    flat = out.reshape(-1)
    for start in range(0, flat.size, CHUNK):
        part = flat[start : start + CHUNK]
        part[:] = std * rng.standard_normal(part.size, dtype=np.float32)
    return out


def leaves(sizes: Sizes, seed: int) -> dict[str, Pending]:
    """Every tensor, drawn when it is read."""
    dtype = np.dtype(ml_dtypes.bfloat16)
    return {
        name: Pending(
            shape, dtype, lambda name=name, shape=shape: draw(name, shape, seed)
        )
        for name, shape in shapes(sizes).items()
    }


def config(sizes: Sizes) -> dict[str, Any]:
    """`config.json`."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8192,
        "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"},
        "bos_token_id": 0,
        "eos_token_id": 1,
        **dataclasses.asdict(sizes),
    }


def write_shards(out: Path, tensors: Mapping[str, Pending], shard_bytes: int) -> None:
    """Write tensors as one file, or as shards and their index.

    Raises:
      FileExistsError: the folder holds safetensors files already.
    """
    out.mkdir(parents=True, exist_ok=True)
    if held := sorted(path.name for path in out.glob("*.safetensors")):
        raise FileExistsError(f"{out} holds {held[0]} already: choose another folder")
    parts = list(_parts(tensors, shard_bytes))
    files, total = {}, sum(tensor.nbytes for tensor in tensors.values())
    for i, part in enumerate(parts, 1):
        file = SINGLE
        if len(parts) > 1:
            file = f"model-{i:05d}-of-{len(parts):05d}.safetensors"
        with (out / file).open("wb") as opened:
            write_arrays(opened, part)
        files |= dict.fromkeys(part, file)
    if len(parts) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": files}
        (out / INDEX).write_text(json.dumps(index, indent=1))


def _parts(tensors: Mapping[str, Pending], limit: int) -> Iterator[dict[str, Pending]]:
    part: dict[str, Pending] = {}
    for name, tensor in tensors.items():
        held = sum(each.nbytes for each in part.values())
        if part and held + tensor.nbytes > limit:
            yield part
            part = {}
        part[name] = tensor
    yield part


def main(options: Options) -> None:
    """Write the folder."""
    sizes = SIZES[options.size]
    if options.tied is not None:
        sizes = dataclasses.replace(sizes, tie_word_embeddings=options.tied)
    tensors = leaves(sizes, options.seed)
    write_shards(options.out, tensors, options.shard_bytes)
    (options.out / "config.json").write_text(json.dumps(config(sizes), indent=1))
    count = sum(math.prod(tensor.shape) for tensor in tensors.values())
    print(f"{options.out}: {count:,} parameters")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
