"""Sizes of one program on a Hopper GPU: the table, and whether they fit.

`hopper.json` says for each number of tokens how a unit of work is cut and where scales
go. It is static: made from what the compiler says, not from time on a card.
"""

import json
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from typing import Any

from qjax_kernels.int_matmul.fragments import INPUTS, OUTPUTS, TiledWeight
from qjax_kernels.int_matmul.stripes import Stripes, stripes

GROUPS = (32, 64)  # beside multiples of 128
WARPGROUP, REGISTERS, PRODUCER = 128, 65536, 40
MOST_REGISTERS = 240  # of a thread that multiplies
COPIED = 16  # tokens that leave at a time
BARRIERS = 1024  # bytes for these and for what the compiler adds


@dataclass(frozen=True)
class Launch:
    """One program.

    Args:
      tokens: of one unit, 8 to 256, a multiple of 8: columns of the matrix unit.
      warpgroups: that multiply, 64 outputs each; one more brings the data.
      stages: units in flight.
      scale_on: "sums" of each group (exact products), or "weights" (rounded to
        bfloat16; cheaper from 64 tokens on).

    Raises:
      ValueError: a size that the hardware does not have.
    """

    tokens: int
    warpgroups: int
    stages: int
    scale_on: str = "sums"

    def __post_init__(self):
        if self.tokens not in range(8, 257, 8):
            raise ValueError(
                f"Launch.tokens is {self.tokens}; it must be a multiple of 8 up to 256"
            )
        if self.warpgroups not in (2, 3, 4):
            raise ValueError(
                f"Launch.warpgroups is {self.warpgroups}; it must be 2, 3 or 4"
            )
        if self.stages < 2:
            raise ValueError(f"Launch.stages is {self.stages}; it must be at least 2")
        if self.scale_on not in ("sums", "weights"):
            raise ValueError(
                f'Launch.scale_on is {self.scale_on!r}; it must be "sums" or "weights"'
            )

    @property
    def outputs(self) -> int:
        """Outputs of one unit."""
        return OUTPUTS * self.warpgroups

    @property
    def copied(self) -> int:
        """Tokens whose results leave at a time."""
        return next(c for c in (COPIED, 8) if self.tokens % c == 0)

    @property
    def registers(self) -> int:
        """Of a thread that multiplies, once the others have given theirs away."""
        threads = WARPGROUP * (self.warpgroups + 1)
        start = REGISTERS // threads // 8 * 8
        left = start * threads - WARPGROUP * PRODUCER
        own = left // (WARPGROUP * self.warpgroups) // 8 * 8
        return min(own, MOST_REGISTERS)

    def fitted(self, weight: TiledWeight) -> "Launch":
        """With as many stages as shared memory holds, up to those given."""
        fixed = shared_bytes(replace(self, stages=2), weight)
        stage = shared_bytes(replace(self, stages=3), weight) - fixed
        room = (table()["shared_memory"] - fixed) // stage
        return replace(self, stages=max(2, min(self.stages, 2 + room)))

    def stripes(self, M: int, weight: TiledWeight) -> Stripes:
        """Who computes what: sums are cut if the shorter stripes are worth it.

        A piece of a sum is written and read once in float32; what that costs is counted
        in units, by the bytes that one brings in.
        """
        programs = table()["programs"]
        whole, cut = (
            stripes(M, weight.K, weight.N, self.tokens, self.outputs, programs, w)
            for w in (True, False)
        )
        moved = 8 * cut.slots * cut.token_blocks * self.tokens * weight.N
        unit = self.outputs * INPUTS * weight.bits // 8 + self.tokens * INPUTS * 2
        extra = moved / (programs * unit) if cut.slots > 1 else 0
        return cut if cut.each + extra < whole.each else whole


def shared_bytes(launch: Launch, weight: TiledWeight) -> int:
    """Shared memory of one program."""
    rows = max(INPUTS // (weight.group or INPUTS), 1)
    per_output = weight.scale.dtype.itemsize
    sums = 0
    if weight.zero is not None:
        per_output += weight.zero.dtype.itemsize
        sums = 4 * rows * sums_width(launch.tokens)
    codes = launch.outputs * INPUTS * weight.bits // 8
    stage = (
        codes + rows * launch.outputs * per_output + launch.tokens * INPUTS * 2 + sums
    )
    out = launch.outputs * launch.copied * 4
    return launch.stages * stage + out + BARRIERS


def sums_width(tokens: int) -> int:
    """Tokens of one row of sums in memory: a copy has at least 128 bytes."""
    return max(tokens, 32)


@cache
def table() -> dict[str, Any]:
    """What `hopper.json` holds."""
    text = files("qjax_kernels.int_matmul").joinpath("hopper.json").read_text()
    return json.loads(text)


def choose(M: int, weight: TiledWeight) -> Launch:
    """The table's entry for a number of tokens, fitted to shared memory."""
    rows = table()["rows"]
    row = next(r for r in rows if r["up_to_M"] is None or r["up_to_M"] >= M)
    return Launch(**row["launch"]).fitted(weight)


def unfit(group: int | None) -> str:
    """Why the kernel does not take weights of a group size; empty if it does."""
    if group is None or group in GROUPS or group % INPUTS == 0:
        return ""
    return f"group is {group}; the kernel for Hopper takes 32, 64 and multiples of 128"
