"""`qjax export`: a quantized model as a folder that other libraries load."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from qjax.commands.inputs import open_model
from qjax.commands.output import wide_console
from qjax.io.checkpoint import MANIFEST, read_manifest
from qjax.io.export import export
from qjax.results import read

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
        model = open_model(self.model)
        recipe, base = _origin(model.folder)
        export(
            self.out,
            model.params,
            model=model.folder,
            format=self.format,
            recipe=recipe,
            quality=None if self.results is None else measured(self.results),
            base=base or model.name,
            shard_bytes=int(self.shard_gb * 10**9),
        )
        console = wide_console()
        bits = model.kv_bits
        if bits is not None:
            console.print(
                f"note: keys and values were trained in {bits} bits, which the "
                "checkpoint does not say: serve it with such a cache"
            )
        console.print(f"wrote {self.out} ({self.format})")


def measured(file: Path) -> dict[str, Any]:
    """Every metric in a file of results, by its name and what it was measured on.

    Raises:
      OSError, ValueError: the file is missing or damaged, or holds no results.
    """
    found: dict[str, Any] = {}
    for record in read(file):
        text = record.context.get("text")
        where = record.label if text is None else text["name"]
        for name, value in record.metrics.items():
            if name != "tokens_per_second":
                found[f"{name.replace('_', ' ')}, {where}"] = value
    if not found:
        raise ValueError(f"--results {file} holds no results")
    return found


def _origin(folder: Path) -> tuple[Any, str | None]:
    """What made a folder of ours, and from which model."""
    if not (folder / MANIFEST).is_file():
        return None, None
    body = read_manifest(folder)
    return body["recipe"], body["metadata"].get("model")
