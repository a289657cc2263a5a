"""Draw grid.jsonl: the kernel's time over the least time of XLA's form.

python kernels/bench/grid_picture.py    writes grid.png

A row for each format, a column for each shape; operations without an XLA form beside
them are not drawn.
"""

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from qjax.plots import STYLE
from qjax.results import read

HERE = Path(__file__).parent


def ratios(path: Path) -> dict[tuple[str, str], float]:
    """Kernel's time over XLA's least, by format and by shape."""
    found = {}
    for record in read(path):
        least = record.metrics["xla_microseconds"]
        if least is not None:
            generation, kind, shape = record.label.split()
            key = f"{generation} {kind}", shape
            found[key] = record.metrics["kernel_microseconds"] / least
    return found


def draw(found: dict[tuple[str, str], float], path: Path) -> None:
    """Write a PNG."""
    rows = list(dict.fromkeys(kind for kind, _ in found))
    columns = list(dict.fromkeys(shape for _, shape in found))
    table = np.array([[found.get((r, c), np.nan) for c in columns] for r in rows])
    with matplotlib.rc_context(STYLE):
        size = 3 + 1.1 * len(columns), 1.5 + 0.26 * len(rows)
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        norm = TwoSlopeNorm(0.0, vmin=-2.0, vmax=2.0)
        axes.imshow(np.log2(table), cmap="RdBu_r", norm=norm, aspect="auto")
        for (i, j), ratio in np.ndenumerate(table):
            if np.isfinite(ratio):
                ink = "white" if abs(np.log2(ratio)) > 1.4 else "black"
                label = f"{ratio:.2f}"
                axes.text(j, i, label, ha="center", va="center", color=ink, size=8)
        axes.set_xticks(range(len(columns)), columns, rotation=30, ha="right", size=8)
        axes.set_yticks(range(len(rows)), rows, size=8)
        axes.grid(visible=False)
        axes.set_title("kernel's time by its schedule / least time of XLA's form")
        figure.savefig(path, dpi=110)


if __name__ == "__main__":
    draw(ratios(HERE / "grid.jsonl"), HERE / "grid.png")
