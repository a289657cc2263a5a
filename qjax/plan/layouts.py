"""The model to plan for, from its configuration alone."""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
)

from qjax import models
from qjax.io.shards import read_json
from qjax.models import Function, architecture, functional
from qjax.models.fields import Fields

NAMED: Mapping[str, dict[str, Any]] = json.loads(
    Path(__file__).with_name("layouts.json").read_text(encoding="utf-8")
)
LEARNED = ("gpt2", "opt")


@dataclass(frozen=True, eq=False)
class Layout:
    """A model without weights: its name, the fields of `config.json`, what they say."""

    name: str
    fields: Mapping[str, Any]
    module: ModuleType
    config: Any

    def shapes(self) -> tuple[Function, Any]:
        """`(f, params)`, layers stacked, with bfloat16 shapes in place of arrays."""

        def make():
            return self.module.build(
                self.config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16, scan_layers=True
            )

        return functional(nnx.eval_shape(make))

    @property
    def positions(self) -> int | None:
        """How many tokens long its texts may be; None if it does not say."""
        names = ("max_position_embeddings", "n_positions")
        return next((self.fields[n] for n in names if n in self.fields), None)

    @property
    def learned_positions(self) -> bool:
        """Whether each of them has an embedding of its own."""
        return self.fields["model_type"] in LEARNED

    @property
    def weights(self) -> int:
        """Number of parameters."""
        return sum(x.size for x in jax.tree.leaves(self.shapes()[1]))


def layout(model: str) -> Layout:
    """The model of that name, folder or hub id; only its `config.json` is read.

    Raises:
      FileNotFoundError: there is none.
      ValueError: its configuration is not supported, or it has no cache to decode with.
    """
    known = {name.lower(): name for name in NAMED}
    model = known.get(model.lower(), model)
    fields = _fields(model)
    name = Path(model).name if Path(model).exists() else model
    return from_fields(name, fields)


def from_fields(name: str, fields: Mapping[str, Any]) -> Layout:
    """The model that a `config.json` describes.

    Raises:
      ValueError: it is not supported, or it has no cache to decode with.
    """
    module = architecture(str(fields.get("model_type")))
    found = Layout(name, fields, module, module.from_fields(Fields(fields)))
    if found.shapes()[0].init_cache is None:
        raise ValueError(f"{name} has no key-value cache: plan a model that decodes")
    return found


def _fields(model: str) -> Mapping[str, Any]:
    if model in NAMED:
        return NAMED[model]
    folder = models.BUNDLED if model == "bundled" else Path(model).expanduser()
    if folder.is_dir():
        return read_json(folder / "config.json")
    try:
        with _quiet():
            return read_json(Path(hf_hub_download(model, "config.json")))
    except (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
    ):
        raise FileNotFoundError(
            f"{model} is no folder and no model on the hub that can be reached; "
            f"layouts known by name are bundled, {', '.join(NAMED)}"
        ) from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without a warning for every try of a name that leads nowhere."""
    log = logging.getLogger("huggingface_hub")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)
