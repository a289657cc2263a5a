"""The static schedule of a kernel, as the TPU's compiler writes it.

With a flag that is not documented libtpu writes the bundles (instruction words, one a
cycle) of every kernel. A count covers one grid step, its branches as if all were taken;
waiting for memory is not in it.

It must be set before libtpu is loaded: import this module first.
"""

import os
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DUMP = Path(tempfile.mkdtemp(prefix="schedules-"))
os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={DUMP}"

from aot import compiled  # noqa: E402

from qjax_kernels.compat import chip  # noqa: E402

# Products per bundle in squares of the matrix unit's width. Pallas says 2 for v6e and
# v7x; but bfloat16 schedules there hold more products than 2 could do in their bundles.
SQUARES = 4
SCHEDULE = "*final_hlo-static-per-bundle-utilization.txt"
MOST = 2**50  # cycles: beyond it lies what XLA writes where its estimate overflows
ESTIMATE = re.compile(r'"estimated_cycles":"(\d+)"')
FLOAT8 = (("float8_e5m2", "float8_e4m3b11fnuz"), ("float8_e5m2", "float8_e4m3fn"))


@dataclass(frozen=True)
class Compiled:
    """What one program costs.

    Attributes:
      bundles: of one grid step of the kernel.
      spills: vector registers that such a step stores because none is free.
      beside: of all other operations of the program, loops counted once.
      temporaries: bytes of HBM beside arguments and results.
    """

    bundles: int
    spills: int
    beside: int
    temporaries: int


def compile_for(
    generation: str, kernel: str, f: Callable[..., Any], *shapes: Any
) -> Compiled:
    """Compile `f` for one device and count the bundles of its kernel, by name.

    Raises:
      RuntimeError: the compiler wrote no schedule.
    """
    clear()
    program = compiled(generation, f, *shapes)
    temporaries = program.memory_analysis().temp_size_in_bytes
    counts = bundle_counts()
    spills = sum(spilled(path) for path in DUMP.glob(f"*-{kernel}.{SCHEDULE}"))
    clear()
    bundles = sum(n for name, n in counts.items() if f"-{kernel}." in name)
    if not bundles:
        raise RuntimeError(f"libtpu wrote no schedule of {kernel!r}: {list(counts)}")
    rest = sum(n for name, n in counts.items() if "<late-" not in name) - bundles
    return Compiled(bundles, spills, rest, temporaries)


def bundle_counts() -> dict[str, int]:
    """Bundles of every part of the program."""
    return {
        path.name: sum(1 for line in path.read_text().splitlines()[4:] if line.strip())
        for path in DUMP.glob(SCHEDULE)
    }


def spilled(path: Path) -> int:
    """Vector registers that a schedule stores for want of others.

    A line of it has what each bundle uses of every unit, in the order of its head.
    """
    _, head, *lines = path.read_text().splitlines()
    column = head.replace(" ", "").split(",").index("VSTORE:SPILL")
    return sum(int(line.split()[column]) for line in lines[2:] if line.strip())


class OverflowedError(RuntimeError):
    """An estimate of XLA's is no number of cycles."""


def estimated(text: str) -> int:
    """Cycles that XLA estimates for its own operations of a compiled program.

    Raises:
      OverflowedError: an estimate overflowed.
    """
    estimates = [int(n) for n in ESTIMATE.findall(text)]
    if max(estimates, default=0) > MOST:
        raise OverflowedError("XLA's estimate of cycles overflows")
    return sum(estimates)


def clear() -> None:
    """Forget the files of the program before."""
    for path in DUMP.iterdir():
        path.unlink()


def clock(generation: str) -> float:
    """Cycles per second, from the peak rate."""
    known = chip(generation)
    squares = SQUARES * known.mxu_column_size**2
    return known.bf16_ops_per_second / (2 * squares)


def memory_cycles(generation: str, size: float) -> float:
    """Cycles in which HBM delivers `size` bytes."""
    return size / chip(generation).mem_bw_bytes_per_second * clock(generation)


def product_cycles(generation: str, products: float, contract: str) -> float:
    """Cycles of that many products at the peak rate of the type contracted.

    A type that the matrix unit does not take counts as bfloat16.
    """
    known = chip(generation)
    rates = {
        "int4": known.int4_ops_per_second,
        "int8": known.int8_ops_per_second,
        **dict.fromkeys(FLOAT8[known.generation >= 7], known.fp8_ops_per_second),
    }
    rate = rates.get(contract) or known.bf16_ops_per_second
    return 2 * products / rate * clock(generation)
