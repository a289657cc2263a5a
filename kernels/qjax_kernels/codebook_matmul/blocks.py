"""Sizes of one grid step on a TPU, from `blocks.json`."""

from qjax_kernels.codebook_matmul.weight import CodebookWeight
from qjax_kernels.scaled import Blocks, table

OP = "codebook_matmul"


def kind(weight: CodebookWeight) -> str:
    """`4_group` or `2_channel`: bits, and whether groups have scales."""
    return f"{weight.bits}_{'channel' if weight.groups == 1 else 'group'}"


def choose(generation: str, M: int, weight: CodebookWeight) -> Blocks:
    """The table's entry for a problem.

    Raises:
      ValueError: the table has none.
    """
    return table.choose(OP, kind(weight), generation, M)


def left_to_xla(generation: str, M: int, weight: CodebookWeight) -> str:
    """Why XLA runs such a product at least as well; empty if it does not."""
    return table.left_to_xla(OP, kind(weight), generation, M)
