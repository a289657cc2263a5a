"""Quantized models as folders that other libraries load."""

import json
import os
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qjax.core.qtensor import QTensor, is_quantized
from qjax.io import awq, bitsandbytes, compressed_tensors, gptq, hqq
from qjax.io.folder import check_link, published
from qjax.io.fused import Stored, refuse_unlike, warn_of_unlike
from qjax.io.huggingface import (
    find_folder,
    leaf_shapes,
    read_config,
    with_coded_cache,
)
from qjax.io.matrices import Matrix
from qjax.io.modelcard import model_card
from qjax.io.modules import Linear, Writer
from qjax.io.named import NamedLeaf, check_whole, named_leaves
from qjax.io.shard_writer import ShardWriter
from qjax.io.shards import read_json
from qjax.models.coded_cache import holds_cache_scales
from qjax.trace.paths import flatten_with_paths

FORMATS: dict[str, Writer] = {
    "compressed-tensors": compressed_tensors,
    "gptq": gptq.Writer(1),
    "gptq-v2": gptq.Writer(2),
    "awq": awq,
    "bitsandbytes": bitsandbytes,
    "hqq": hqq,
}
# What a Hugging Face folder holds beside its configuration and its weights.
COPIED = (
    *("generation_config.json", "*token*.json", "*token*.model", "*token*.txt"),
    *("vocab.*", "merges.txt", "*.jinja"),
)
# Linear layers of torch models that ours leave out.
UNLISTED = {
    "bert": (
        *("pooler.dense", "bert.pooler.dense"),
        *("cls.predictions.decoder", "cls.seq_relationship"),
    )
}
SHARD_BYTES = 5 * 10**9


def export(
    path: str | os.PathLike[str],
    qparams: Any,
    *,
    model: str | os.PathLike[str],
    format: str = "compressed-tensors",
    recipe: Any = None,
    quality: Mapping[str, Any] | None = None,
    base: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write a quantized model as `save_pretrained` would: a folder for other libraries.

    The folder holds sharded safetensors, `config.json` with its `quantization_config`,
    the tokenizer and generation configuration of `model`, and a model card. Codes and
    scales are those of the QTensors, bit for bit. It appears under its name only once
    it is complete.

    Args:
      path: the folder to write, which must not exist. Its parents are made.
      qparams: the parameters of a model that `load_model` gave, layers stacked or not.
      model: the folder or hub id that they came from, for everything but the weights.
      format: "compressed-tensors", which vLLM and transformers read and which says the
        most; "gptq" (zero points less one), "gptq-v2", "awq" (the GEMM layout),
        "bitsandbytes" or "hqq" (float zero points).
      recipe: what made the parameters, for the model card.
      quality: measured values by name, for the model card.
      base: the float model's name, for the model card; `model`'s unless given.
      shard_bytes: the most bytes in one file of weights, one tensor at least.

    Returns:
      The folder's path.

    Raises:
      FileExistsError: `path` exists.
      FileNotFoundError: there is no such model.
      ValueError: `format` is unknown or cannot hold a leaf; the leaves are not those of
        `model`, each of its shape, and the message names one; none is quantized;
        linears that vLLM runs as one are in NVFP4 with different global scales; or a
        file of `model` is a link out of its folder.

    Warns:
      QuantizationWarning: linears that vLLM runs as one are otherwise not stored alike.
    """
    path = Path(path).resolve()
    if format not in FORMATS:
        raise ValueError(f"format is {format!r}; it must be one of {tuple(FORMATS)}")
    if os.path.lexists(path):
        raise FileExistsError(f"{path} exists already: give another folder")
    source = find_folder(os.fspath(model))
    bits = _bits(qparams)
    with published(path) as folder:
        schemes = _write(folder, source, qparams, format, shard_bytes)
        _copy(source, folder)
        base = base or _name(model, source)
        card = model_card(path.name, base, format, bits, schemes, recipe, quality)
        (folder / "README.md").write_text(card, encoding="utf-8")
    return path


def _name(model: str | os.PathLike[str], source: Path) -> str:
    return source.name if Path(model).exists() else os.fspath(model)


def _bits(qparams: Any) -> float:
    """Bits per quantized weight."""
    leaves = [x for _, x in flatten_with_paths(qparams) if is_quantized(x)]
    if not leaves:
        raise ValueError("no leaf is quantized: save the float model instead")
    return 8 * sum(x.nbytes for x in leaves) / sum(x.size for x in leaves)


def _write(
    folder: Path, source: Path, qparams: Any, format: str, shard_bytes: int
) -> Counter[str]:
    """Write weights and configuration; how many linears are stored in each way."""
    raw, (module, config) = read_json(source / "config.json"), read_config(source)
    coded_cache = holds_cache_scales(qparams)
    if coded_cache and format != "compressed-tensors":
        raise ValueError(
            f"the model has scales for keys and values, which {format} cannot hold; "
            "compressed-tensors can"
        )
    config = with_coded_cache(config, source) if coded_cache else config
    check_whole(leaf_shapes(module, config), qparams)
    writer, linears, schemes = FORMATS[format], list[Linear](), Counter[str]()
    stored: dict[str, Stored] = {}
    dtype = None
    with ShardWriter(folder, shard_bytes) as shards:
        for named in named_leaves(module, config, qparams):
            scheme, second, inputs = None, None, None
            if isinstance(named.leaf, QTensor):
                matrix = _matrix(named, format)
                tensors, scheme = writer.write(matrix)
                dtype = dtype or matrix.dtype
                schemes[_kind(matrix)] += 1
                second = _number(matrix.part.global_scale)
                inputs = _number(matrix.acts.global_scale)
                for last, array in tensors.items():
                    shards.add(f"{named.module}.{last}", array)
            else:
                shards.add(named.name, named.array())
            if named.linear or (named.conv1d and _takes_conv1d(format)):
                linears.append(Linear(named.module, named.path, scheme))
                stored[named.module] = Stored(scheme, second, inputs)
                refuse_unlike(stored, named.module)
    warn_of_unlike(stored)
    if getattr(config, "tied", False):
        linears.append(Linear("lm_head", "embed/embedding", None))
    unlisted = UNLISTED.get(raw.get("model_type", ""), ())
    linears += [Linear(name, name, None) for name in unlisted]
    raw = {k: v for k, v in raw.items() if k not in ("torch_dtype", "dtype")}
    raw |= {
        "dtype": np.dtype(dtype).name,
        "quantization_config": writer.config(linears),
    }
    if coded_cache:
        raw["quantization_config"]["kv_cache_scheme"] = compressed_tensors.CACHE
    text = json.dumps(raw, indent=2, sort_keys=True) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
    for name in getattr(writer, "copies", ()):
        text = json.dumps(raw["quantization_config"], indent=2) + "\n"
        (folder / name).write_text(text, encoding="utf-8")
    return schemes


def _number(scale: np.ndarray | None) -> float | None:
    return None if scale is None else float(scale.reshape(()))


def _matrix(named: NamedLeaf, format: str) -> Matrix:
    if not (named.linear or (named.conv1d and _takes_conv1d(format))):
        raise ValueError(
            f"{named.path} is quantized, but {format} holds linear layers alone, and "
            f"{named.name} is none in torch: leave it in float"
        )
    return Matrix.of(named.path, named.leaf)


def _takes_conv1d(format: str) -> bool:
    return getattr(FORMATS[format], "conv1d", False)


def _kind(matrix: Matrix) -> str:
    """How a linear is stored, in words."""
    activation = matrix.activation
    if activation is None:
        return matrix.part.format.name
    kind = "dynamic" if activation.dynamic else "static"
    return f"{matrix.part.format.name}, inputs {activation.format.name} {kind}"


def _copy(source: Path, folder: Path) -> None:
    for pattern in COPIED:
        for file in source.glob(pattern):
            if file.is_file() and not (folder / file.name).exists():
                check_link(source, file)
                shutil.copyfile(file, folder / file.name)
