"""`qjax sites`: where each weight of a model meets an activation."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from qjax.commands.inputs import open_model
from qjax.commands.output import wide_console
from qjax.trace.report import table
from qjax.trace.sites import sites


@dataclass(frozen=True)
class ShowSites:
    """The coverage table: every weight, its sites and other uses, and what is unused.

    Nothing is computed; the weights of a Hugging Face folder are not read.
    """

    model: Annotated[str, tyro.conf.Positional]
    """A Hugging Face folder, one `qjax quantize` wrote, a hub id, or "bundled"."""
    scan_layers: bool = True
    """Trace one layer for all; --no-scan-layers lists every layer by itself. A folder
    that `qjax quantize` wrote keeps the layers as they were saved."""

    def run(self) -> None:
        """Trace and print."""
        model = open_model(self.model, scan_layers=self.scan_layers, lazy=True)
        console = wide_console()
        console.print(table(sites(model.f, model.params, *model.example)))
