"""What several subcommands take: a text to read and a model to run."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from qjax.core.qtensor import Stacked, is_quantized
from qjax.data import Text, encode_text, file_text, load_text
from qjax.evals import Protocol
from qjax.io.checkpoint import MANIFEST, holds_quantized, read_manifest, restore
from qjax.io.huggingface import find_folder, load_shell, load_weights, read_tokenizer
from qjax.models import BUNDLED
from qjax.models.coded_cache import holds_cache_scales
from qjax.trace.apply import apply
from qjax.train.named import quantize_kv

# Tokens to read (0: all) and tokens per window: what GPTQ, AWQ and others after them
# report, and what a CPU does in a minute.
PAPER_CUT, QUICK_CUT = (0, 2048), (16384, 512)
Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class TextOptions:
    """The text to evaluate on, and how it is cut."""

    text: Path | None = None
    """A UTF-8 text file, in place of a dataset."""
    dataset: Literal["pydoc", "wikitext2", "c4", "ptb"] | None = None
    """A named text (pydoc, which needs no network)."""
    tokens: int | None = None
    """Tokens to evaluate on, from the start of the text; 0: all of it (all of
    wikitext2, c4 and ptb, as in the papers; 16384 of pydoc and --text)."""
    window: int | None = None
    """Tokens per window, at most the model's context (2048 for wikitext2, c4 and ptb,
    as in the papers; 512 for pydoc and --text)."""
    stride: int | None = None
    """Tokens between the starts of windows (None: side by side, as the papers)."""
    batch: int = 8
    """Windows, or rows of a task, per batch."""

    def load(self) -> Text:
        """The text. Raises ValueError if two are asked for, OSError if none is had."""
        if self.text is not None and self.dataset is not None:
            raise ValueError("--text and --dataset name two texts: give one of them")
        if self.text is not None:
            return file_text(self.text)
        return load_text(self.dataset or "pydoc")

    def encode(
        self, text: Text, model: "Model"
    ) -> tuple[Int[np.ndarray, " count"], Protocol]:
        """The tokens and how they are cut, checked against the model's context."""
        count, window = self.cut(getattr(model.config, "context", None))
        if model.tokenizer is None:
            raise ValueError(f"{model.name} has no tokenizer to read the text with")
        tokens = encode_text(model.tokenizer, text)[: count or None]
        return tokens, Protocol(window, self.stride, self.batch, text.max_windows)

    def cut(self, context: int | None) -> tuple[int, int]:
        """Tokens to read (0: all) and tokens per window, for a model's context."""
        paper = self.text is None and self.dataset not in (None, "pydoc")
        count, window = PAPER_CUT if paper else QUICK_CUT
        if self.tokens is not None:
            count = self.tokens
        if count < 0:
            raise ValueError(f"--tokens is {count}: give 0 (all) or more")
        if self.window is None:
            return count, min(window, context or window)
        if context is not None and self.window > context:
            raise ValueError(
                f"--window is {self.window}, but the model reads {context} tokens"
            )
        return count, self.window


@dataclass(frozen=True)
class Model:
    """A model to run: `f(params, tokens)`, its configuration, name and folder.

    `scan_layers`: whether its layers are stacked; `kv_bits`: of keys and values, which
    `f` rounds to them; None: it does not.
    """

    name: str
    f: Callable[..., Any]
    params: Any
    config: Any
    folder: Path
    scan_layers: bool
    kv_bits: int | None = None

    @cached_property
    def tokenizer(self) -> Any:
        """The folder's tokenizer, or None; read when first asked for."""
        return read_tokenizer(self.folder)

    @property
    def example(self) -> tuple[jax.ShapeDtypeStruct]:
        """Abstract inputs to trace with."""
        return (jax.ShapeDtypeStruct((1, 16), jnp.int32),)

    @property
    def weights(self) -> int:
        """Number of parameters."""
        leaves = jax.tree.leaves(self.params, is_leaf=is_quantized)
        return sum(int(np.prod(leaf.shape)) for leaf in leaves)

    def run(self, params: Any, dtype: Dtype) -> tuple[Callable[..., Any], Any]:
        """The pair to evaluate: quantized leaves in low bits, the rest in `dtype`."""
        return apply(self.f), computing(params, dtype)


def open_model(
    model: str,
    *,
    scan_layers: bool = True,
    lazy: bool = False,
    in_float: bool = False,
) -> Model:
    """A model by folder, by hub id, or the "bundled" one.

    A folder that `qjax quantize` wrote gives its quantized parameters, with the layers
    as they were saved, whatever `scan_layers` says; one of `qjax qat --kv-bits` rounds
    keys and values as it was trained. Parameters keep the dtype they are stored in.

    Args:
      model: a folder, a hub id, or "bundled".
      scan_layers: whether the layers are stacked.
      lazy: whether a Hugging Face folder's leaves stay on disk.
      in_float: refuse a model that is quantized already.

    Raises:
      FileNotFoundError: there is no such model.
      ValueError: it is damaged, not supported or already quantized.
    """
    folder = find_folder(BUNDLED if model == "bundled" else model)
    name = Path(model).name if Path(model).exists() else model
    if (folder / MANIFEST).is_file():
        if in_float and holds_quantized(folder):
            raise ValueError(
                f"{model} is already quantized: give the model that it was made from"
            )
        stacked, params = _saved_stacked(folder), restore(folder)
        f, config = load_shell(folder, stacked, holds_cache_scales(params))
        bits = read_manifest(folder)["metadata"].get("kv_bits")
        f = f if bits is None else quantize_kv(f, bits)
        return Model(name, f, params, config, folder, stacked, bits)
    f, params, config = load_weights(folder, scan_layers=scan_layers, lazy=lazy)
    leaves = jax.tree.leaves(params, is_leaf=is_quantized)
    if in_float and any(map(is_quantized, leaves)):
        raise ValueError(
            f"{model} is already quantized: give the model that it was made from"
        )
    return Model(name, f, params, config, folder, scan_layers)


def _saved_stacked(folder: Path) -> bool:
    """Whether a saved folder's layers are stacked: as stated, else by their names."""
    body = read_manifest(folder)
    stated = body["metadata"].get("scan_layers")
    if stated is None:
        return not any(re.match(r"layers/\d", name) for name in body["arrays"])
    return bool(stated)


def computing(params: Any, dtype: Dtype) -> Any:
    """Parameters to compute with in `dtype`; codes and scales stay as stored."""

    def cast(leaf: Any) -> Any:
        if isinstance(leaf, Stacked):
            return replace(leaf, parts=tuple(cast(part) for part in leaf.parts))
        if is_quantized(leaf):
            return replace(leaf, dtype=jnp.dtype(dtype))
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf.astype(dtype)
        return leaf

    return jax.tree.map(cast, params, is_leaf=is_quantized)
