"""`lax.ragged_dot` with quantized experts."""

from typing import Any

import jax
import jax.numpy as jnp

from qjax.core.qtensor import QTensor
from qjax.ops.activations import code_input


def ragged_matmul(
    x: Any,
    q: QTensor,
    group_sizes: Any,
    *,
    site: int = 0,
    dtype: Any = None,
    precision: Any = None,
) -> jax.Array:
    """Rows of `x[M, K]` times the expert they belong to, `q` with `[E, K, N]`.

    The XLA form decodes the experts in the activation's dtype beside the contraction;
    a coded activation is contracted as the values it stands for.

    Args:
      x: tokens, sorted by expert.
      q: experts on the leading axis.
      group_sizes: `[E]`, tokens of each expert.
      site: position among the leaf's sites.
      dtype: of the result; default that of `x`.
      precision: as in `lax.ragged_dot`.

    Returns:
      `[M, N]`.
    """
    dtype = jnp.dtype(x.dtype if dtype is None else dtype)
    return _qragged(x, q, group_sizes, site, dtype, precision)


def _ragged(
    x: Any, q: QTensor, group_sizes: Any, site: int, dtype: Any, precision: Any
) -> Any:
    acts = q.site(site)
    if acts.activation is not None:
        x = code_input(x, acts).decode(x.dtype)
    return jax.lax.ragged_dot(
        x,
        q.matrix(x.dtype, site),
        group_sizes,
        precision=precision,
        preferred_element_type=dtype,
    )


_ragged.__name__ = "qragged_matmul"
_qragged = jax.jit(_ragged, static_argnums=(3, 4, 5))
