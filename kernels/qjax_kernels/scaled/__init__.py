"""The TPU kernel that weights of any code share: decode, contract, scale.

An operation (`float_matmul`, `codebook_matmul`) brings its `Decoder`.
"""

from qjax_kernels.scaled.operands import Blocks, Decoder, Operands

__all__ = ["Blocks", "Decoder", "Operands"]
