"""What NVIDIA's compilers make of a kernel for an H200 that is not there.

XLA's plugin for CUDA compiles from a description of the card (`h200.txtpb`); Mosaic
writes the PTX of every kernel and what the assembler says of registers. The directory
must be set before JAX is imported: import this module first.
"""

import os
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DUMP = Path(tempfile.mkdtemp(prefix="ptx-"))
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["MOSAIC_GPU_DUMP_TO"] = str(DUMP)

import jax  # noqa: E402
from jax.experimental import topologies  # noqa: E402

CARD = Path(__file__).parent / "h200.txtpb"
OPCODE = re.compile(r"^\s+(?:\{[^}]*?; )?(?:@!?%p\d+\s+)?([a-z][a-z0-9_]*)\.\S+.*;")
PRODUCT = re.compile(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k")
WEIGHTS = 64  # of one unit in one thread: 64 outputs by 128 inputs in 128 threads


@dataclass(frozen=True)
class Compiled:
    """What one program costs; the kernel's numbers are 0 if it has none.

    Attributes:
      registers: of a thread, before warpgroups give some to each other.
      spilled: bytes that did not fit into registers.
      instructions: of the kernel's PTX.
      per_weight: PTX instructions for each weight in the loop that multiplies.
      columns: of the matrix unit's product, which tokens fill; its 64 rows are outputs.
      temporaries: bytes of memory beside arguments and results.
    """

    registers: int
    spilled: int
    instructions: int
    per_weight: float
    columns: int
    temporaries: int


def sharding() -> Any:
    """Where arguments live: one H200."""
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=CARD.read_text(), topology="1x1x1"
    )
    return jax.sharding.SingleDeviceSharding(topology.devices[0])


def compile_for(
    f: Callable[..., Any], shapes: tuple[Any, ...], options: dict[str, Any]
) -> Compiled:
    """Compile `f` for one H200 and count what its kernel holds.

    Args:
      f: at most one Mosaic kernel, and what is around it.
      shapes: of its arguments.
      options: of XLA.

    Raises:
      RuntimeError: there is more than one kernel.
    """
    for path in DUMP.iterdir():
        path.unlink()
    place = sharding()
    placed = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes
    )
    program = jax.jit(f, compiler_options=options or None).lower(*placed).compile()
    temporaries = program.memory_analysis().temp_size_in_bytes
    kernels = sorted(DUMP.glob("*.ptx"))
    if len(kernels) > 1:
        raise RuntimeError(f"the program has several kernels: {kernels}")
    if not kernels:
        return Compiled(0, 0, 0, 0.0, 0, temporaries)
    said = kernels[0].with_suffix(".ptxas").read_text()
    lines = kernels[0].read_text().splitlines()
    return Compiled(
        registers=int(re.findall(r"Used (\d+) registers", said)[0]),
        spilled=sum(map(int, re.findall(r"(\d+) bytes spill", said))),
        instructions=len(instructions(lines)),
        per_weight=len(instructions(multiplying(lines))) / WEIGHTS,
        columns=max(int(n) for line in lines for n in PRODUCT.findall(line)),
        temporaries=temporaries,
    )


def instructions(lines: list[str]) -> list[str]:
    """The opcodes of PTX, without what only moves or names registers."""
    found = (OPCODE.match(line) for line in lines)
    return [m[1] for m in found if m and m[1] not in ("mov", "reg")]


def multiplying(lines: list[str]) -> list[str]:
    """The basic blocks that hold the matrix unit's instructions."""
    blocks: list[list[str]] = [[]]
    for line in lines:
        if line.startswith("$L"):
            blocks.append([])
        blocks[-1].append(line)
    return [line for b in blocks if any("wgmma.mma" in x for x in b) for line in b]
