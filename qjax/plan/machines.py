"""Machines to plan for: chips with their limits, and how many share a program.

Limits of TPUs are JAX's own (`pltpu.get_tpu_info_for_chip`, one TensorCore each), where
Google's page does not promise more; those of the links and of NVIDIA's card are data
sheets', named in `Chip.source`.
"""

import math
import re
from dataclasses import dataclass
from functools import cache

from jax.experimental.pallas import tpu as pltpu

GB, TERA = 10**9, 10**12


@dataclass(frozen=True)
class Chip:
    """What one device can do; a device is what JAX shards over.

    Attributes:
      name: as on the command line.
      memory: bytes of device memory.
      bandwidth: bytes per second to and from it.
      link: bytes per second that all links of a device send, one direction.
      peaks: operations per second of the matrix units by number format; a format that
        is not there runs at the rate of "bfloat16".
      source: where the figures stand.
    """

    name: str
    memory: int
    bandwidth: int | float
    link: int | float
    peaks: dict[str, int | float]
    source: str

    def peak(self, kind: str) -> int | float:
        """Operations per second of the matrix units in that format."""
        return self.peaks.get(kind, self.peaks["bfloat16"])


@dataclass(frozen=True)
class Machine:
    """Devices that share one program.

    Attributes:
      name: as on the command line, `v5e:2x4`; one for each machine.
      platform: "tpu" or "gpu".
      topology: the compiler's name for it.
      devices: how many.
      chip: each of them.
      per_chip: devices on one chip.
    """

    name: str
    platform: str
    topology: str
    devices: int
    chip: Chip
    per_chip: int = 1

    @property
    def said(self) -> str:
        """How many devices with how much memory, in words."""
        chip, chips = self.chip, self.devices // self.per_chip
        of = f" ({self.per_chip} devices on each of {_counted(chips, 'chip')})"
        return (
            f"{self.devices} x {chip.memory / 2**30:.1f} GiB, "
            f"{chip.bandwidth / 1e9:,.0f} GB/s" + (of if self.per_chip > 1 else "")
        )


def _counted(count: int, name: str) -> str:
    return f"{count} {name}" + ("s" if count > 1 else "")


# Bytes per second over all links in both directions, per chip:
# docs.cloud.google.com/tpu/docs/{v5e,v5p,v6e,tpu7x}.
LINKS = {"v5e": 400e9, "v5p": 1200e9, "v6e": 800e9, "v7x": 1200e9}
TPUS = {
    "v5e": pltpu.ChipVersion.TPU_V5E,
    "v5p": pltpu.ChipVersion.TPU_V5P,
    "v6e": pltpu.ChipVersion.TPU_V6E,
    "v7x": pltpu.ChipVersion.TPU_7X,
}
# A v5p device is a whole chip, both TensorCores as one; of v7x each is a device.
CORES_PER_DEVICE = {"v5p": 2}
DEVICES_PER_CHIP = {"v7x": 2}
# Bytes per second of a device, where JAX says less (2.46e12) than Google's page.
BANDWIDTHS = {"v5p": 2765e9}
ALIASES = {"tpu7x": "v7x"}
AXES = {"v5e": 2, "v5p": 3, "v6e": 2, "v7x": 3}

H200 = Chip(
    "h200",
    memory=141 * GB,
    bandwidth=4.8 * TERA,
    link=450e9,
    peaks={"bfloat16": 989e12, "int8": 1979e12, "float8": 1979e12},
    source="NVIDIA H200 data sheet (SXM, without sparsity; NVLink 900 GB/s both ways)",
)


@cache
def tpu(generation: str) -> Chip:
    """One device of a TPU generation."""
    info = pltpu.get_tpu_info_for_chip(TPUS[generation], 1)
    cores = CORES_PER_DEVICE.get(generation, 1)
    rates = {
        "bfloat16": info.bf16_ops_per_second,
        "int8": info.int8_ops_per_second,
        "float8": info.fp8_ops_per_second,
        "int4": info.int4_ops_per_second,
    }
    return Chip(
        generation,
        memory=cores * info.hbm_capacity_bytes,
        bandwidth=BANDWIDTHS.get(generation, cores * info.mem_bw_bytes_per_second),
        link=LINKS[generation] / 2 / DEVICES_PER_CHIP.get(generation, 1),
        peaks={kind: cores * rate for kind, rate in rates.items() if rate},
        source="pltpu.get_tpu_info_for_chip; links: docs.cloud.google.com/tpu/docs",
    )


# docs.cloud.google.com/tpu/docs/{v5e,v6e}: all slices; {v5p,tpu7x}: the small ones,
# and above them cubes of 4x4x4 chips, sides ascending, up to so many chips.
FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
SOLID = ("1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4")
MOST_CHIPS = {"v5p": 6144, "v7x": 9216}
VALID = "v5e:2x4, v6e:2x2, v5p:2x2x1, v7x:2x2x1, h200 or h200:8"


def machine(name: str) -> Machine:
    """The machine of that name.

    >>> machine("v5e:2x4").devices
    8

    Raises:
      ValueError: there is none; the message says how names are made.
    """
    kind, _, size = name.lower().partition(":")
    generation = ALIASES.get(kind, kind)
    own = f"{generation}:{size}" if size else generation
    if generation == "h200" and re.fullmatch(r"[1248]?", size):
        count = int(size or 1)
        own = own if count > 1 else generation
        return Machine(own, "gpu", f"1x1x{count}", count, H200)
    axes = AXES.get(generation, 0)
    if axes and re.fullmatch(r"[1-9]\d*" + r"x[1-9]\d*" * (axes - 1), size):
        chips = _chips(generation, size)
        per_chip = DEVICES_PER_CHIP.get(generation, 1)
        known = {"v7x": "tpu7x"}.get(generation, generation)
        return Machine(
            own, "tpu", f"{known}:{size}", chips * per_chip, tpu(generation), per_chip
        )
    raise ValueError(f"--topology is {name!r}; valid are names such as {VALID}")


def _chips(generation: str, size: str) -> int:
    """How many chips a slice of that size has.

    Raises:
      ValueError: the generation has no such slice.
    """
    sides = [int(side) for side in size.split("x")]
    chips, most = math.prod(sides), MOST_CHIPS.get(generation, 0)
    cubes = sides == sorted(sides) and not any(side % 4 for side in sides)
    if size in (SOLID if most else FLAT) or (cubes and chips <= most):
        return chips
    sizes = ", ".join(SOLID if most else FLAT)
    larger = f" and AxBxC in multiples of 4, A <= B <= C, up to {most} chips"
    raise ValueError(
        f"--topology: {generation} has no slices of {size}; it has {sizes}"
        + (larger if most else "")
    )
