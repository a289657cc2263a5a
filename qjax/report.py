"""What a quantization run did: per leaf, and per site where data was seen."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table


@dataclass(frozen=True)
class LeafReport:
    """What happened to a leaf, or to a run of layers of a stacked leaf.

    Attributes:
      path: the leaf's path.
      names: the names (layers) that this row is about.
      method: class name of the method.
      format: name of the weight format.
      activations: name of the activation format, or "float".
      bits_per_weight: all arrays counted.
      error: relative Frobenius error of the weights.
      seconds: time to solve, compilation included.
      fallback: what could not be done as asked; empty if nothing.
    """

    path: str
    names: tuple[str, ...]
    method: str
    format: str
    activations: str
    bits_per_weight: float
    error: float
    seconds: float
    fallback: str = ""


@dataclass(frozen=True)
class SiteReport:
    """What happened at a site that calibration reached.

    Attributes:
      name: the site, `layers/3/attn/q_proj/kernel`.
      method: class name of the method.
      format: name of the weight format.
      samples: tokens seen; of the expert that saw fewest, where there are experts.
      error_before: relative error of the site's output, rounded to nearest instead.
      error: relative error of the site's output, `|X (W - Q)| / |X W|`; like
        `error_before` of some 256 to 512 evenly spaced outputs where there are more.
      measured: "output" where the errors come from `E[x x^T]`, "diagonal" where from
        `E[x^2]` alone, "weights" where no input was seen; "block" where they are those
        of the output of the whole block, against the full-precision model.
      seconds: statistics and solver, compilation included; shared out over the sites
        that were solved together.
      notes: the method's own numbers: damping, dead features.
      fallback: what could not be done as asked; empty if nothing.
    """

    name: str
    method: str
    format: str
    samples: int
    error_before: float
    error: float
    measured: str
    seconds: float
    notes: Mapping[str, float] = field(default_factory=dict)
    fallback: str = ""


@dataclass(frozen=True)
class TransformReport:
    """What a transform (AWQ, SmoothQuant, ...) did with sites that share an input.

    Attributes:
      names: the sites.
      method: class name of the transform.
      into: the leaves that took the inverse scale, or "the activation"; empty where
        nothing was changed.
      error_before, error: squared output errors without and with the scale, where the
        method measures them.
      notes: the method's own numbers.
      remark: why nothing was changed; empty if it was.
    """

    names: tuple[str, ...]
    method: str
    into: str
    error_before: float | None
    error: float | None
    notes: Mapping[str, float] = field(default_factory=dict)
    remark: str = ""


@dataclass(frozen=True)
class Report:
    """One `LeafReport` per quantized leaf, one `SiteReport` per calibrated site.

    `transforms` tells what became of each mapping of AWQ, SmoothQuant and their kin;
    `allocations` hold the choices of mixed precision; `notes` are remarks about the
    whole.
    """

    leaves: tuple[LeafReport, ...]
    notes: tuple[str, ...] = ()
    sites: tuple[SiteReport, ...] = ()
    transforms: tuple[Any, ...] = ()
    allocations: tuple[Any, ...] = ()

    def __iter__(self):
        return iter(self.leaves)

    def __len__(self) -> int:
        return len(self.leaves)

    def __getitem__(self, index: int) -> LeafReport:
        return self.leaves[index]

    def table(self) -> Table:
        """The report for a terminal."""
        columns = ("leaf", "method", "format", "activations", "bits", "error", "s")
        table = Table(*columns, "fallback")
        for row in self.leaves:
            bits, error = f"{row.bits_per_weight:.3f}", f"{row.error:.4f}"
            rest = (row.method, row.format, row.activations, bits, error)
            last = (f"{row.seconds:.2f}", row.fallback)
            table.add_row(_shown(row.path, row.names), *rest, *last)
        return table

    def write(self, path: str | Path) -> None:
        """Write JSON lines: each line says which kind of row it is.

        The file appears when it is whole.
        """
        path = Path(path)
        kinds = (
            ("leaf", self.leaves),
            ("site", self.sites),
            ("transform", self.transforms),
        )
        lines = [
            json.dumps({"kind": kind, **asdict(row)})
            for kind, rows in kinds
            for row in rows
        ]
        lines += [
            json.dumps({"kind": "allocation", **line})
            for allocation in self.allocations
            for line in allocation.lines()
        ]
        lines += [json.dumps({"kind": "note", "text": note}) for note in self.notes]
        partial = path.with_name(f".{path.name}.part")
        partial.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        partial.replace(path)


def _shown(path: str, names: tuple[str, ...]) -> str:
    return names[0] if len(names) == 1 else f"{path} ({len(names)} layers)"
