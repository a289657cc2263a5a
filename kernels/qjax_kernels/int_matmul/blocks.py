"""Sizes of one grid step on a TPU: the table, and whether they fit into VMEM.

`blocks.json` says for each TPU generation, kind of activation, width of the codes and
number of tokens which sizes and algebra had the shortest static schedule, and what XLA
does as well by itself.
"""

import json
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from math import lcm
from typing import Any

import jax.numpy as jnp

from qjax_kernels import crossing
from qjax_kernels.coded import WORD
from qjax_kernels.compat import chip
from qjax_kernels.int_matmul.weight import IntWeight

LANES, SUBLANES, TOKENS, MIB = 128, 8, 16, 2**20
LEAST_LIMIT = 16 * MIB  # the compiler's own default on most generations
WHOLE_TOKENS = 4 * MIB
FEWEST = 256  # tokens below which a step is not made smaller
ROOM = 4 * MIB  # what the compiler keeps beside the arrays that a kernel names


@dataclass(frozen=True)
class Blocks:
    """One grid step, and how it computes.

    Args:
      m: tokens.
      n: outputs.
      k: inputs.
      tile: outputs computed at a time; 0 is `n`.
      chunk: inputs decoded at a time; 0 is the least that whole registers allow.
      scale_on: "sums" of each group, or "weights".
      decode: "native" conversions of narrow integers; "offset" puts codes into the
        mantissa of 128, whose share is subtracted with the zero points (bfloat16
        tokens, 2 and 4 bits, scales on sums).

    Raises:
      ValueError: an unknown word, or "offset" with scales on weights.
    """

    m: int
    n: int
    k: int
    tile: int = 0
    chunk: int = 0
    scale_on: str = "sums"
    decode: str = "native"

    def __post_init__(self):
        if self.scale_on not in ("sums", "weights"):
            raise ValueError(
                f'Blocks.scale_on is {self.scale_on!r}; it must be "sums" or "weights"'
            )
        if self.decode not in ("native", "offset"):
            raise ValueError(
                f'Blocks.decode is {self.decode!r}; it must be "native" or "offset"'
            )
        if self.decode == "offset" and self.scale_on == "weights":
            raise ValueError('Blocks.decode is "offset"; scale_on must be "sums"')

    def fitted(self, M: int, weight: IntWeight, int8_tokens: bool = False) -> "Blocks":
        """No larger than the problem, and with whole groups and words along K.

        Where K has no such divisor, one step takes all of it; where codes cannot be
        decoded by the offset, they are decoded natively.
        """
        k = inputs(self.k, weight)
        n = min(self.n, -(-weight.N // LANES) * LANES)
        tile = min(self.tile or n, n)
        tile = tile if n % tile == 0 else n
        n, tile = (weight.N, weight.N) if n > weight.N else (n, tile)
        unit = registers(weight.bits)
        whole = weight.rows % unit == 0 and (weight.group or unit) % unit == 0
        fits = whole and weight.bits < 8 and not int8_tokens
        decode, scale_on = self.decode if fits else "native", self.scale_on
        if weight.bits == crossing.BITS:
            decode, scale_on = "offset", "sums"
        rows = _up(M, TOKENS) if decode == "offset" else M  # whole registers
        sizes = {"m": min(self.m, rows), "n": n, "k": k, "tile": tile}
        return replace(self, **sizes, decode=decode, scale_on=scale_on)


def registers(bits: int) -> int:
    """Inputs in whole registers of codes."""
    return crossing.UNIT if bits == crossing.BITS else SUBLANES * WORD // bits


def inputs(most: int, weight: IntWeight) -> int:
    """The largest divisor of the stored rows up to `most` that suits the hardware."""
    unit = lcm(LANES, weight.group or 1, registers(weight.bits))
    sizes = range(most // unit * unit, 0, -unit)
    return next((k for k in sizes if weight.rows % k == 0), weight.rows)


@cache
def table() -> dict[str, Any]:
    """What `blocks.json` holds."""
    return json.loads(
        files("qjax_kernels.int_matmul").joinpath("blocks.json").read_text()
    )


def choose(
    generation: str, M: int, weight: IntWeight, int8_tokens: bool = False
) -> Blocks:
    """The table's entry for a problem, fitted to it and, in its tokens, to VMEM.

    Raises:
      ValueError: the table has no entry for the generation.
    """
    tokens = "int8" if int8_tokens else "bfloat16"
    rows = [
        row
        for row in table()["rows"]
        if (row["generation"], row["tokens"]) == (generation, tokens)
        and row["bits"] >= weight.bits
    ]
    if not rows:
        known = sorted({row["generation"] for row in table()["rows"]})
        raise ValueError(
            f"generation is {generation!r}; blocks are known for {', '.join(known)}"
        )
    narrowest = min(row["bits"] for row in rows)
    rows = [row for row in rows if row["bits"] == narrowest]
    row = next((r for r in rows if r["up_to_M"] is None or r["up_to_M"] >= M), rows[-1])
    blocks = Blocks(**row["blocks"]).fitted(M, weight, int8_tokens)
    while blocks.m > FEWEST and too_large(generation, blocks, weight, int8_tokens):
        blocks = replace(blocks, m=_up(blocks.m // 2, FEWEST))
    return blocks


def vmem_bytes(
    blocks: Blocks, weight: IntWeight, int8_tokens: bool = False, out_bytes: int = 4
) -> int:
    """VMEM of one grid step: double-buffered blocks, scratch, decoded weights."""
    m, n, k = _up(blocks.m, SUBLANES), _up(blocks.n, LANES), _up(blocks.k, LANES)
    G, tile = _up(weight.groups, SUBLANES), _up(blocks.tile, LANES)
    whole = int8_tokens or tokens_stay(blocks, weight)
    x_columns = _up(weight.rows, LANES) if whole else k
    x_bytes = 4 if int8_tokens else 2  # float32 at most, or bfloat16
    streamed = m * x_columns * x_bytes + k * n * weight.bits // 8 + m * n * out_bytes
    streamed += G * n * weight.scale.dtype.itemsize
    if weight.zero is not None:
        streamed += G * n * weight.zero.dtype.itemsize
    sums = m * _up(weight.groups, LANES) * 4
    step_groups = _up(-(-blocks.k // (weight.group or blocks.k)), SUBLANES)
    wide = max(weight.rows // blocks.k, 1) * step_groups * n * 4
    scratch = m * n * 4 + wide + (m * x_columns * 2 + m * LANES * 4) * int8_tokens
    decoded = k * tile * 4 + m * tile * 8
    if blocks.decode == "offset":  # tokens in another order, and what orders them
        unit = lcm(registers(weight.bits), weight.group or 1)
        width = max(unit, 512) if weight.bits == crossing.BITS else LANES
        scratch += 10 * m * k + 8 * width**2 + wide
    return 2 * (streamed + sums) + scratch + decoded


def tokens_stay(blocks: Blocks, weight: IntWeight) -> bool:
    """Whether all inputs of a block of tokens are read once, not with every step."""
    return 2 * blocks.m * weight.rows <= WHOLE_TOKENS


def vmem_limit(
    generation: str, blocks: Blocks, weight: IntWeight, int8_tokens: bool = False
) -> int:
    """The limit to give to the compiler.

    Raises:
      ValueError: the blocks need more VMEM than the generation has.
    """
    problem = too_large(generation, blocks, weight, int8_tokens)
    if problem:
        raise ValueError(problem)
    return max(LEAST_LIMIT, _up(vmem_bytes(blocks, weight, int8_tokens) + ROOM, MIB))


def contracted(
    generation: str, blocks: Blocks, weight: IntWeight, int8_tokens: bool
) -> str:
    """The type in which the matrix unit takes tokens and weights.

    Weights times their scales are no integers; codes are exact in bfloat16.
    """
    whole = weight.groups == 1 or blocks.scale_on == "sums"
    native = chip(generation).is_matmul_supported(jnp.int8, jnp.int8)
    return "int8" if int8_tokens and native and whole else "bfloat16"


def too_large(
    generation: str, blocks: Blocks, weight: IntWeight, int8_tokens: bool = False
) -> str:
    """That the blocks need more VMEM than there is; empty if they do not."""
    capacity = chip(generation).vmem_capacity_bytes
    needed = vmem_bytes(blocks, weight, int8_tokens) + ROOM
    if needed <= capacity:
        return ""
    return (
        f"blocks m={blocks.m}, n={blocks.n}, k={blocks.k} need about "
        f"{needed / MIB:.0f} MiB of VMEM; {generation} has {capacity / MIB:.0f} MiB"
    )


def left_to_xla(
    generation: str, M: int, weight: IntWeight, int8_tokens: bool = False
) -> str:
    """Why XLA runs such a product at least as well; empty if it does not."""
    kind = {
        "generation": generation,
        "bits": weight.bits,
        "tokens": "int8" if int8_tokens else "bfloat16",
        "channel": weight.groups == 1,
        "zero": weight.zero is not None,
    }
    for row in table()["left_to_xla"]:
        same = all(kind[name] in values for name, values in row["of"].items())
        if same and row["above_M"] < M <= row.get("up_to_M", M):
            return row["why"]
    return ""


def _up(size: int, unit: int) -> int:
    return -(-size // unit) * unit
