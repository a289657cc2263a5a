"""`x @ w` where `w` is floats of 4 or 8 bits with scales."""

from qjax_kernels.float_matmul.weight import FloatWeight

__all__ = ["FloatWeight"]
