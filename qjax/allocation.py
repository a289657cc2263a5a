"""What an allocation of quantizers to sites costs, and how it reads."""

from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any

import jax
import numpy as np
from rich.table import Table

from qjax.core.ranges import calibrator_of
from qjax.solving import Job


@dataclass(frozen=True)
class AllocationRow:
    """What one site got.

    Attributes:
      name: the site.
      choice: number of the candidate.
      candidate: its label.
      bits_per_weight: all arrays counted.
      nbytes: of the site.
      errors: its sensitivity to each candidate.
    """

    name: str
    choice: int
    candidate: str
    bits_per_weight: float
    nbytes: int
    errors: tuple[float, ...]


@dataclass(frozen=True)
class AllocationReport:
    """The allocation of one step.

    Attributes:
      sensitivity: what was measured.
      candidates: their labels.
      budget: bytes allowed.
      weights: how many there are.
      rows: one for each site.
    """

    sensitivity: str
    candidates: tuple[str, ...]
    budget: int
    weights: int
    rows: tuple[AllocationRow, ...]

    @property
    def nbytes(self) -> int:
        """Bytes taken."""
        return sum(row.nbytes for row in self.rows)

    @property
    def bits_per_weight(self) -> float:
        """The average, all arrays counted."""
        return 8 * self.nbytes / self.weights

    @property
    def error(self) -> float:
        """The sum that was minimised."""
        return sum(row.errors[row.choice] for row in self.rows)

    def table(self) -> Table:
        """The allocation for a terminal."""
        table = Table("site", "candidate", "bits", *self.candidates)
        for row in self.rows:
            numbers = (f"{error:.4g}" for error in row.errors)
            bits = f"{row.bits_per_weight:.3f}"
            table.add_row(row.name, row.candidate, bits, *numbers)
        return table

    def lines(self) -> list[dict[str, Any]]:
        """The rows as JSON values."""
        return [
            {
                "kind": "allocation",
                "name": row.name,
                "candidate": row.candidate,
                "bits_per_weight": row.bits_per_weight,
                "nbytes": row.nbytes,
                "sensitivity": self.sensitivity,
                "errors": dict(zip(self.candidates, row.errors)),
            }
            for row in self.rows
        ]


def label(method: Any) -> str:
    """A candidate for tables, such as `RTN int4 g128`."""
    if method is None:
        return "float"
    coded = method.activation
    acts = f", activations {coded.format.name}" if coded is not None else ""
    return f"{type(method).__name__} {method.format.name}{acts}"


def site_bytes(job: Job, method: Any) -> int:
    """Bytes of every array that one site of a leaf keeps with this method."""
    if method is None:
        one = job.layout.K * job.layout.N * np.dtype(job.dtype).itemsize
        return job.per_name * one
    return job.per_name * _matrix_bytes(
        method, job.layout.K, job.layout.N, np.dtype(job.dtype).name
    )


def _matrix_bytes(method: Any, K: int, N: int, dtype: str) -> int:
    arrays = jax.eval_shape(partial(_kept, method), jax.ShapeDtypeStruct((K, N), dtype))
    return sum(prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(arrays))


def _kept(method: Any, w: Any) -> Any:
    """What a solved site of `w[K, N]` consists of."""
    calibrator, grid = calibrator_of(method), None
    if calibrator is not None:
        format = method.activation.format
        statistic = calibrator.statistic(format)
        grid = calibrator.grid(format, statistic.finalize(statistic.init(w.shape[0])))
    if hasattr(method, "solve"):
        return method.solve(w), grid
    stats = {
        name: statistic.finalize(statistic.init(w.shape[0]))
        for name, statistic in method.statistics.items()
    }
    return replace(method.solve_site(w, stats), notes={}), grid
