"""Outlier weights of a leaf (SpQR): XLA's form, and the kernel for those in tiles."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from qjax.core.qtensor import QTensor
from qjax.ops.kernels import Choice, unfit_target
from qjax.ops.targets import Target
from qjax.ops.tiles import Tiled
from qjax_kernels.element_outlier import Elements
from qjax_kernels.element_outlier.pallas_tpu import element_outlier, too_large


def elements_choice(
    q: QTensor, x: Any, implementation: str, target: Target
) -> Choice | None:
    """How outlier weights run; None where there are none.

    XLA takes all of them, so that "pallas" is no demand on them.
    """
    if q.sparse is None:
        return None
    if implementation == "xla":
        return Choice("xla", refused="XLA was asked for")
    why = unfit_target(target)
    if not why and not isinstance(q.sparse, Tiled):
        why = "the outliers are not in tiles: qjax.pack(qparams), in bfloat16"
    if not why and (x.ndim != 2 or x.dtype != jnp.bfloat16):
        why = f"the kernel takes one matrix in bfloat16, not {x.dtype.name}{x.shape}"
    if not why and isinstance(q.sparse, Tiled):
        shape = q.layout.K, q.layout.N
        why = too_large(Elements(q.sparse.words, shape))
    return Choice("xla", refused=why) if why else Choice("pallas", target.generation)


def elements_product(
    dot: Any, x: Any, q: QTensor, dtype: Any, generation: str | None
) -> Any:
    """`x @ S`."""
    shape = (q.layout.K, q.layout.N)
    if generation is None or not isinstance(q.sparse, Tiled):
        assert q.sparse is not None
        return dot(x, q.sparse.dense(shape, x.dtype))
    return _on_kernel(x, q.sparse, shape, jnp.dtype(dtype), generation)


@partial(jax.custom_jvp, nondiff_argnums=(2, 3, 4))
def _on_kernel(
    x: Any, sparse: Tiled, shape: tuple[int, int], dtype: Any, generation: str
) -> Any:
    """On the kernel; the gradient is that of the values."""
    elements = Elements(sparse.words, shape)
    return element_outlier(x, elements, generation=generation, dtype=dtype)


@_on_kernel.defjvp
def _on_kernel_jvp(
    shape: tuple[int, int], dtype: Any, generation: str, primals: Any, tangents: Any
) -> Any:
    def values(x: Any, sparse: Tiled) -> Any:
        return jnp.matmul(x, sparse.dense(shape, x.dtype)).astype(dtype)

    out = _on_kernel(*primals, shape, dtype, generation)
    return out, jax.jvp(values, primals, tangents)[1]
