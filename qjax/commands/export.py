"""`qjax export`: a quantized model as a folder that other libraries load."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from qjax.commands.inputs import open_model
from qjax.commands.output import wide_console
from qjax.io.checkpoint import MANIFEST, read_manifest
from qjax.io.export import export
from qjax.results import Record, read

Format = Literal["compressed-tensors", "gptq", "gptq-v2", "awq", "bitsandbytes", "hqq"]


@dataclass(frozen=True)
class Export:
    """Write a quantized model for vLLM, transformers and others.

    OUT holds safetensors, the configuration that says how they are quantized, tokenizer
    and model card; it appears when all of it is written.
    """

    model: Annotated[str, tyro.conf.Positional]
    """A folder that `qjax quantize` wrote, or a quantized Hugging Face folder or id."""
    out: Annotated[Path, tyro.conf.Positional]
    """The folder to write; it must not exist."""
    format: Format = "compressed-tensors"
    """The checkpoint format."""
    shard_gb: float = 5.0
    """The most GB (10^9 bytes) in one file of weights."""
    results: Path | None = None
    """What `qjax eval MODEL --out FILE` wrote: measured quality for the model card."""

    def run(self) -> None:
        """Read, write, and say where it is."""
        shard_bytes = self.shard_bytes()
        quality = None if self.results is None else measured(self.results, self.model)
        model = open_model(self.model)
        recipe, base = _origin(model.folder)
        export(
            self.out,
            model.params,
            model=model.folder,
            format=self.format,
            recipe=recipe,
            quality=quality,
            base=base or model.name,
            shard_bytes=shard_bytes,
        )
        console = wide_console()
        bits = model.kv_bits
        if bits is not None:
            console.print(
                f"note: keys and values were trained in {bits} bits, which the "
                "checkpoint does not say: serve it with such a cache"
            )
        console.print(f"wrote {self.out} ({self.format})")

    def shard_bytes(self) -> int:
        """The most bytes in a file.

        Raises:
          ValueError: it is no number above 0.
        """
        if not (isfinite(self.shard_gb) and self.shard_gb > 0):
            raise ValueError(
                f"--shard-gb is {self.shard_gb}: give a number above 0, such as 5"
            )
        return max(1, int(self.shard_gb * 10**9))


def measured(file: Path, model: str) -> dict[str, Any]:
    """Every metric of a model in a file of results, by name and what it was taken on.

    Args:
      file: the results.
      model: as `qjax eval` was given it; records of other models are left out.

    Raises:
      OSError, ValueError: the file is missing or damaged, holds no results of the
        model, or two that say different things of it.
    """
    records = read(file)
    label = Path(model).name if Path(model).exists() else model
    found: dict[str, Any] = {}
    for record in records:
        name, where = _subject(record)
        if name != label:
            continue
        for metric, value in record.metrics.items():
            if metric == "tokens_per_second":
                continue
            key = f"{metric.replace('_', ' ')}, {where}"
            if found.setdefault(key, value) != value:
                raise ValueError(
                    f"--results {file} holds {key} of {label} twice, {found[key]!r} "
                    f"and {value!r}: keep the record that the model card shall show"
                )
    if not found:
        labels = sorted({_subject(record)[0] for record in records})
        raise ValueError(
            f"--results {file} holds no results of {label}, but of "
            f"{', '.join(labels) or 'no model'}"
        )
    return found


def _subject(record: Record) -> tuple[str, str]:
    """The model of a record of `qjax eval`, and the text or the task."""
    task = record.context.get("task")
    if task is not None:
        return record.label.removesuffix(f", {task}"), str(task)
    text = record.context.get("text")
    if isinstance(text, Mapping) and "name" in text:
        return record.label, str(text["name"])
    return record.label, record.label


def _origin(folder: Path) -> tuple[Any, str | None]:
    """What made a folder of ours, and from which model."""
    if not (folder / MANIFEST).is_file():
        return None, None
    body = read_manifest(folder)
    return body["recipe"], body["metadata"].get("model")
