"""Outlier weights of a leaf in the tiles that a TPU's kernel reads."""

from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp

from qjax.core.pytrees import register
from qjax.core.qtensor import QTensor, Sparse
from qjax_kernels.element_outlier import pack


@dataclass(frozen=True)
class Tiled(Sparse):
    """Outliers that are sorted into the tiles of a TPU's kernel too, in bfloat16."""

    words: Any


register(Tiled, ("values", "rows", "cols", "words"), ())


def tiled(q: QTensor) -> QTensor:
    """The leaf with its outliers in tiles, where they are one matrix in bfloat16."""
    sparse = q.sparse
    if sparse is None or sparse.values.ndim != 1 or isinstance(sparse, Tiled):
        return q
    if sparse.values.dtype != jnp.bfloat16:
        return q  # which the tiles would round
    shape = (q.layout.K, q.layout.N)
    words = pack(sparse.values, sparse.rows, sparse.cols, shape).words
    return replace(q, sparse=Tiled(sparse.values, sparse.rows, sparse.cols, words))


def untiled(q: QTensor) -> QTensor:
    """The leaf without the tiles."""
    sparse = q.sparse
    if not isinstance(sparse, Tiled):
        return q
    return replace(q, sparse=Sparse(sparse.values, sparse.rows, sparse.cols))
