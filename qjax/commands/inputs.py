"""What several subcommands take: a text to read and a model to run."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from qjax import models
from qjax.core.qtensor import Stacked, is_quantized
from qjax.data import Text, encode_text, file_text, load_text
from qjax.evals import Protocol
from qjax.io.checkpoint import MANIFEST, restore
from qjax.io.huggingface import load_model, load_shell
from qjax.trace.apply import apply

BUNDLED = Path(models.__file__).parent / "tiny_llama"
Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class TextOptions:
    """The text to evaluate on, and how it is cut."""

    text: Path | None = None
    """A UTF-8 text file, in place of a dataset."""
    dataset: Literal["pydoc", "wikitext2", "c4", "ptb"] | None = None
    """A named text, cut as the papers cut it (pydoc, which needs no network)."""
    tokens: int = 16384
    """Tokens to evaluate on, from the start of the text; 0: all of it."""
    window: int = 512
    """Tokens per window; the papers take 2048 for models that can read as many."""
    stride: int | None = None
    """Tokens between the starts of windows (None: side by side, as the papers)."""
    batch: int = 8
    """Windows per batch."""

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
        if self.tokens < 0:
            raise ValueError(f"--tokens is {self.tokens}: give 0 (all) or more")
        context = getattr(model.config, "context", None)
        if context is not None and self.window > context:
            raise ValueError(
                f"--window is {self.window}, but the model reads {context} tokens"
            )
        if model.tokenizer is None:
            raise ValueError(f"{model.name} has no tokenizer to read the text with")
        tokens = encode_text(model.tokenizer, text)[: self.tokens or None]
        return tokens, Protocol(self.window, self.stride, self.batch, text.max_windows)


@dataclass(frozen=True)
class Model:
    """A model to run: `f(params, tokens)`, its tokenizer, configuration and name."""

    name: str
    f: Callable[..., Any]
    params: Any
    tokenizer: Any
    config: Any

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


def open_model(model: str, *, scan_layers: bool = True, lazy: bool = False) -> Model:
    """A model by folder, by hub id, or the "bundled" one.

    A folder that `qjax quantize` wrote gives its quantized parameters. Parameters keep
    the dtype they are stored in.
    """
    source = str(BUNDLED) if model == "bundled" else model
    name = Path(model).name if Path(model).exists() else model
    if (Path(source) / MANIFEST).is_file():
        f, tokenizer, config = load_shell(source, scan_layers=scan_layers)
        params = restore(source)
    else:
        f, params, tokenizer, config = load_model(
            source, scan_layers=scan_layers, lazy=lazy
        )
    return Model(name, f, params, tokenizer, config)


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
