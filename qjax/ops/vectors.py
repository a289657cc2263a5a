"""Weights that are sums of code vectors (AQLM) with a few tokens.

Each token meets every vector of the codebook once; what a code of the weight gives is
then looked up, and the weight itself is never written out. For more tokens than a
vector has inputs that is more work than decoding.
"""

from typing import Any

import jax

from qjax.core.coded import Coded
from qjax.core.formats import Additive
from qjax_kernels.codebook_matmul.additive import AdditiveWeight, products_first

MOST_BITS = 8
"""1x16 has as many products as a weight of 4096 inputs and 8192 outputs."""


def has_products(part: Coded, x: Any) -> bool:
    """Whether products come first, for `x[M, K]`."""
    format = part.format
    if not isinstance(format, Additive) or part.lead or x.ndim != 2:
        return False
    return format.bits <= MOST_BITS and x.shape[0] <= format.length


def vectors_product(x: Any, part: Coded, dtype: Any) -> jax.Array:
    """`x[M, K]` times the part, `[M, N]`, in float32."""
    weight = AdditiveWeight(part.codes[None], part.codebook[None], part.scale)
    return products_first(x, weight, dtype=dtype)
