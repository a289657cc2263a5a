"""Named real shapes, and how many weights are kept in float."""

from qjax_kernels.int_matmul.specs import SPECS, TOKENS, Spec

__all__ = ["SHARE", "SPECS", "TOKENS", "Spec"]

SHARE = 0.01
"""Of all weights: SpQR keeps about one in a hundred (its table 1)."""
