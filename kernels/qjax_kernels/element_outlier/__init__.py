"""Products with a few outlier weights, which low bits leave to a sparse matrix."""

from qjax_kernels.element_outlier.elements import Elements, pack

__all__ = ["Elements", "pack"]
