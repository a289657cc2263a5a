"""Whether a Hugging Face checkpoint is one that can be loaded as it is.

A checkpoint that another library quantized keeps its scales in tensors that no float
model has: read as if it were float it would give wrong numbers, so that a format that
has no reader (`qjax/io/quantized.py`) is refused.
"""

import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qjax.io.quantized import READERS
from qjax.io.shards import DTYPES, Tensor
from qjax.trace.control import QuantizationWarning

QUANTIZED_FIELDS = ("quantization_config", "compression_config")
FLOATS = {tag: np.dtype(DTYPES[tag]) for tag in ("F64", "F32", "F16", "BF16")}
SHOWN = 3

# Tensors that checkpoints carry and no model needs: buffers, and heads left out.
HARMLESS = re.compile(
    r"(^|\.)(rotary_emb\.inv_freq|attn\.(masked_)?bias|position_ids|pooler\..*)$"
)
HARMLESS_IF_TIED = re.compile(r"^lm_head\.weight$")
HARMLESS_IN_BERT = re.compile(r"^cls\.")


def check_config(raw: Mapping[str, Any], folder: Path, quantized: bool = False) -> None:
    """Refuse a configuration of a checkpoint in a quantized format that is not read.

    Args:
      raw: the configuration.
      folder: where it is, for the message.
      quantized: whether there is a reader for its `quantization_config`.

    Raises:
      ValueError: naming the field.
    """
    for field in QUANTIZED_FIELDS:
        found = raw.get(field)
        if found is None or (quantized and field == "quantization_config"):
            continue
        how = found.get("quant_method", found) if isinstance(found, Mapping) else found
        raise ValueError(
            f"{folder / 'config.json'}: {field} says that the weights are quantized "
            f"already ({how}), but only float checkpoints are supported: "
            f"{', '.join(FLOATS)}; and those of {', '.join(READERS)}"
        )


def check_no_code(raw: Mapping[str, Any], folder: Path) -> None:
    """Refuse a configuration that needs Python code of its own, which is never run.

    A model that is also a part of transformers, such as Phi-3, may name the file that
    it once came with, if the class there is one of its `model_type`: it is read as any
    of that type.

    Raises:
      ValueError: naming the class.
    """
    named = raw.get("auto_map")
    if named is None:
        return
    own = str(raw.get("model_type")).replace("_", "").lower()
    listed = named if isinstance(named, Mapping) else {"auto_map": named}
    for kind, name in listed.items():
        last = str(name).rpartition(".")[2].lower()
        if kind != "AutoTokenizer" and not (own and last.startswith(own)):
            raise ValueError(
                f"{folder / 'config.json'}: auto_map names {name!r}, Python code that "
                "comes with the model, and qjax runs none: only models of the types in "
                "qjax.models can be read"
            )


def check_dtypes(tensors: Iterable[Tensor]) -> None:
    """Refuse weights in anything but floats of 16 bits or more.

    Raises:
      ValueError: naming the tensor.
    """
    for tensor in tensors:
        if np.dtype(tensor.dtype) not in FLOATS.values():
            raise ValueError(
                f"{tensor.path}: {tensor.name} is {np.dtype(tensor.dtype).name}, but "
                f"only float weights are supported: {', '.join(FLOATS)}"
            )


def warn_of_unread(
    tensors: Iterable[str], read: Iterable[str], config: Any, raw: Mapping[str, Any]
) -> None:
    """Warn of tensors that the model has no place for, except for harmless ones."""
    kinds = [HARMLESS]
    kinds += [HARMLESS_IF_TIED] if getattr(config, "tied", False) else []
    kinds += [HARMLESS_IN_BERT] if raw.get("model_type") == "bert" else []
    left = sorted(
        name
        for name in set(tensors) - set(read)
        if not any(kind.search(name) for kind in kinds)
    )
    if left:
        more = ", ..." if len(left) > SHOWN else ""
        warnings.warn(
            f"the model has no place for {len(left)} of the checkpoint's tensors: "
            f"{', '.join(left[:SHOWN])}{more}",
            QuantizationWarning,
            stacklevel=4,
        )
