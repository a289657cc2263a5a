"""Tables of blocks, kept as data beside each operation.

`{"made_by": ..., "left_to_xla": [{"kinds", "generations", "above_M", "why"}],
"rows": [{"kinds", "generations", "up_to_M", "blocks"}]}`; the first row that fits is
taken, and an entry without generations is for all of them.
"""

import json
from functools import cache
from importlib.resources import files
from typing import Any

from qjax_kernels.compat import GENERATIONS
from qjax_kernels.scaled.operands import Blocks


@cache
def table(op: str) -> dict[str, Any]:
    """What the operation's `blocks.json` holds."""
    return json.loads(files(f"qjax_kernels.{op}").joinpath("blocks.json").read_text())


def sizes(op: str) -> dict[str, Any]:
    """The one entry of a table that is the same for all problems and generations."""
    (row,) = table(op)["rows"]
    return row["blocks"]


def choose(op: str, kind: str, generation: str, M: int) -> Blocks:
    """The table's entry.

    Raises:
      ValueError: the table has none.
    """
    if generation not in GENERATIONS:
        raise ValueError(
            f"TPU generation is {generation!r}; it must be one of {list(GENERATIONS)}"
        )
    for row in table(op)["rows"]:
        if fits(row, kind, generation) and (row["up_to_M"] or M) >= M:
            return Blocks(**row["blocks"])
    raise ValueError(f"{op}/blocks.json has no row for {kind!r} on {generation}")


def left_to_xla(op: str, kind: str, generation: str, M: int) -> str:
    """Why XLA runs such a product at least as well; empty if it does not."""
    for row in table(op)["left_to_xla"]:
        if fits(row, kind, generation) and row["above_M"] < M:
            return row["why"]
    return ""


def fits(row: dict[str, Any], kind: str, generation: str) -> bool:
    """Whether an entry is for a kind of product on a generation."""
    here = generation in row.get("generations", (generation,))
    return here and kind in row["kinds"]
