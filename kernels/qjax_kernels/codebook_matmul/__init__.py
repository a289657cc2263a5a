"""`x @ w` where `w` is indices into a table of levels, or sums of code vectors."""

from qjax_kernels.codebook_matmul.additive import AdditiveWeight
from qjax_kernels.codebook_matmul.weight import CodebookWeight

__all__ = ["AdditiveWeight", "CodebookWeight"]
