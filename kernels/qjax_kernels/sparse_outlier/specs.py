"""Named real shapes, `x[M, K] @ w[K, N]`, and how much is kept in float."""

from qjax_kernels.int_matmul.specs import SPECS, TOKENS, Spec

__all__ = ["FEATURES", "SPECS", "TOKENS", "Spec"]

FEATURES = 0.001
"""Share of outlier features: LLM.int8() finds up to 7 of 4096 with threshold 6."""
