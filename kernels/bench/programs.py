"""The programs that are compiled for hardware that is not there, and their budgets.

Every file of `gates/` declares `GATE`, the deciding programs of one operation on one
kind of hardware; what they may cost stands in the file of `budget/` with its name.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from math import ceil
from pathlib import Path
from typing import Any, Protocol

import ptx
import schedule

from qjax.results import environment

HERE = Path(__file__).parent
MOST = 40  # programs in all: CI compiles them


class Program(Protocol):
    """One kernel at one shape.

    Attributes:
      label: unique among all programs; starts with the hardware.
      config: what a budget holds for: shapes, formats, sizes of blocks.
      budgeted: the metrics that must not rise.
      compilers: packages that compile it, beside JAX.
      platform: "tpu" or "gpu".
    """

    label: str
    config: dict[str, Any]
    budgeted: tuple[str, ...]
    compilers: tuple[str, ...]
    platform: str

    def measure(self) -> dict[str, Any]:
        """Compile it; the metrics, in the order of a table's columns."""
        ...


@dataclass(frozen=True)
class TpuProgram:
    """One Pallas kernel for a TPU; see `Program`.

    Attributes:
      generation: "v5e", "v6e" or "v7x".
      kernel: the name that it gives to `pl.pallas_call`.
      shape: the rest of the label, `16x4096x14336`.
      function: the kernel and what is around it, of `arguments`.
      arguments: shapes.
      step_bytes: what one grid step reads from HBM, of weights at least.
      step_products: multiplications of one grid step on the matrix unit.
      contract: dtype in which the kernel's operands meet: "bfloat16", "int8", "int4" or
        a float8; where it is not native, the limit is that of bfloat16.
      config: what the budget holds for.
      steps: of the grid, or turns of a loop, in a whole call.
    """

    generation: str
    kernel: str
    shape: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    step_bytes: float
    step_products: float
    contract: str
    config: dict[str, Any]
    steps: int
    budgeted: tuple[str, ...] = ("bundles", "spills")
    compilers: tuple[str, ...] = ("libtpu",)
    platform: str = "tpu"

    @property
    def label(self) -> str:
        """`v5e w4a16_g128 16x4096x14336`."""
        return f"{self.generation} {self.kernel} {self.shape}"

    def measure(self) -> dict[str, Any]:
        """Bundles of one grid step beside the limits of memory and matrix unit."""
        found = schedule.compile_for(
            self.generation, self.kernel, self.function, *self.arguments
        )
        memory = schedule.memory_cycles(self.generation, self.step_bytes)
        products = schedule.product_cycles(
            self.generation, self.step_products, self.contract
        )
        limit = max(memory, products)
        return {
            "bundles": found.bundles,
            "hbm_cycles": memory,
            "mxu_cycles": products,
            "over_limit": max(found.bundles, limit) / limit,
            "bundles_beside": found.beside,
            "temporary_bytes": found.temporaries,
            "spills": found.spills,
        }


@dataclass(frozen=True)
class CudaProgram:
    """One program for an H200; see `Program`.

    Attributes:
      name: the rest of the label.
      function: of `arguments`; holds at most one Mosaic kernel.
      arguments: shapes.
      config: what the budget holds for.
      options: of XLA.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    config: dict[str, Any]
    options: tuple[tuple[str, Any], ...] = ()
    budgeted: tuple[str, ...] = (
        "registers",
        "spilled_bytes",
        "instructions",
        "instructions_per_weight",
        "product_columns",
        "temporary_bytes",
    )
    compilers: tuple[str, ...] = ("jax-cuda13-pjrt", "nvidia-cuda-nvcc")
    platform: str = "gpu"

    @property
    def label(self) -> str:
        """`h200 w4a16_g128 16x4096x14336`."""
        return f"h200 {self.name}"

    def measure(self) -> dict[str, Any]:
        """Registers, spills, instructions of PTX, and memory beside the arguments."""
        found = ptx.compile_for(self.function, self.arguments, dict(self.options))
        return {
            "registers": found.registers,
            "spilled_bytes": found.spilled,
            "instructions": found.instructions,
            "instructions_per_weight": found.per_weight,
            "product_columns": found.columns,
            "temporary_bytes": found.temporaries,
        }


def grid_steps(blocks: Any, M: int, K: int, N: int) -> int:
    """Steps of a product's grid."""
    return ceil(M / blocks.m) * ceil(K / blocks.k) * ceil(N / blocks.n)


def gates() -> dict[str, tuple[Program, ...]]:
    """The programs of every file of `gates/`, by its name.

    Raises:
      ValueError: there are more than CI has time for, or two share a label.
    """
    names = sorted(path.stem for path in (HERE / "gates").glob("*.py"))
    found = {name: importlib.import_module(f"gates.{name}").GATE for name in names}
    labels = [program.label for gate in found.values() for program in gate]
    if len(labels) > MOST:
        raise ValueError(f"gates/ has {len(labels)} programs; at most {MOST} are built")
    twice = {label for label in labels if labels.count(label) > 1}
    if twice:
        raise ValueError(f"gates/ has programs with the same label: {sorted(twice)}")
    return found


def budget_of(name: str) -> Path:
    """Where the budget of `gates/<name>.py` stands."""
    return HERE / "budget" / f"{name}.jsonl"


def missing(program: Program) -> list[str]:
    """The compilers of a program that are not installed."""
    return [name for name in program.compilers if not _version(name)]


def context(program: Program) -> dict[str, Any]:
    """Where and with what: the compilers decide the counts."""
    known = environment()
    known["versions"].update({name: version(name) for name in program.compilers})
    return known


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
