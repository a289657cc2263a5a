"""`x @ w` where `w` is integer codes with scales for groups of inputs."""

from qjax_kernels.int_matmul.blocks import Blocks
from qjax_kernels.int_matmul.weight import IntWeight

__all__ = ["Blocks", "IntWeight"]
