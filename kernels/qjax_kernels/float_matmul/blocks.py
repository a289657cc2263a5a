"""Sizes of one grid step on a TPU, from `blocks.json`."""

from qjax_kernels.float_matmul.weight import FloatWeight
from qjax_kernels.scaled import Blocks, table

OP = "float_matmul"


def kind(weight: FloatWeight, coded: bool) -> str:
    """`e4m3_a8_channel`, `e2m1_a16_g32`; larger groups are all `group`."""
    tokens = 8 if coded else 16
    small = weight.group is not None and weight.group < 64
    group = f"g{weight.group}" if small else "group"
    scales = "channel" if weight.groups == 1 else group
    return f"{weight.element}_a{tokens}_{scales}"


def choose(generation: str, M: int, weight: FloatWeight, coded: bool = False) -> Blocks:
    """The table's entry for a problem.

    Raises:
      ValueError: the table has none.
    """
    return table.choose(OP, kind(weight, coded), generation, M)


def left_to_xla(
    generation: str, M: int, weight: FloatWeight, coded: bool = False
) -> str:
    """Why XLA runs such a product at least as well; empty if it does not."""
    return table.left_to_xla(OP, kind(weight, coded), generation, M)
