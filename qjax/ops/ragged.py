"""`lax.ragged_dot` with quantized experts."""

from functools import partial, reduce
from operator import add
from typing import Any

import jax
import jax.numpy as jnp

from qjax.core.coded import Coded
from qjax.core.formats import Int
from qjax.core.qtensor import QTensor, SiteActs
from qjax.ops import pieces
from qjax.ops.activations import code_input, coded_values, integers, of_rows
from qjax.ops.kernels import Choice, check_implementation
from qjax.ops.matmul import promoted
from qjax.ops.ragged_kernels import ragged_choice, ragged_product
from qjax.ops.targets import Target, here


def ragged_matmul(
    x: Any,
    q: QTensor,
    group_sizes: Any,
    *,
    site: int = 0,
    dtype: Any = None,
    weight_dtype: Any = None,
    precision: Any = None,
    implementation: str = "auto",
    target: Target | None = None,
) -> jax.Array:
    """Rows of `x[M, K]` times the expert they belong to, `q` with `[E, K, N]`.

    With one scale per token and one per output feature, int8 meets int8 into int32.
    Otherwise the XLA form decodes the experts beside the contraction, and a coded
    activation is contracted as the values it stands for. A kernel decodes an expert's
    weights where it contracts them.

    Args:
      x: tokens, sorted by expert.
      q: experts on the leading axis; no low rank, outliers, bias or transforms.
      group_sizes: `[E]`, tokens of each expert.
      site: position among the leaf's sites.
      dtype: of the result; default that of the operands.
      weight_dtype: as for `matmul`.
      precision: as in `lax.ragged_dot`.
      implementation: as for `matmul`.
      target: hardware to choose for; default this process's.

    Returns:
      `[M, N]`.

    Raises:
      ValueError: unknown implementation, or no kernel for "pallas".
    """
    x = promoted(x, q, weight_dtype)
    dtype = jnp.dtype(x.dtype if dtype is None else dtype)
    chosen = ragged_chosen_for(x, q, site, implementation, target)
    return ragged_product_of(
        x, q, group_sizes, site, dtype, precision, chosen.generation, False
    )


def ragged_chosen_for(
    x: Any, q: QTensor, site: int, implementation: str, target: Target | None
) -> Choice:
    """How the site runs.

    Raises:
      ValueError: unknown implementation, or no kernel for "pallas".
    """
    check_implementation(implementation)
    return ragged_choice(
        q, site, x, implementation, here() if target is None else target
    )


def ragged_contraction(q: QTensor, site: int) -> str:
    """ "int" where int8 meets int8, else "values"."""
    activation = q.site(site).activation
    formats = [part.format for part in q.parts]
    if activation is None or len(formats) > 1:
        return "values"
    plain = all(
        isinstance(f, Int) and f.symmetric and f.granularity.rows is None
        for f in (formats[0], activation.format)
    )
    return "int" if plain else "values"


def _ragged(
    x: Any,
    q: QTensor,
    group_sizes: Any,
    site: int,
    dtype: Any,
    precision: Any,
    generation: str | None,
    by_piece: bool,
) -> Any:
    acts = of_rows(q.site(site), group_sizes, x.shape[0])
    if generation is not None:
        values = partial(_values, dtype, precision)
        return ragged_product(
            x, acts, q.parts[0], group_sizes, dtype, generation, values
        )
    dot = partial(
        jax.lax.ragged_dot,
        group_sizes=group_sizes,
        precision=precision,
        preferred_element_type=dtype,
    )
    if ragged_contraction(q, site) == "int":
        y = _coded_ragged(x, acts, q.parts[0], group_sizes)
        return y.astype(dtype)
    x = x if acts.activation is None else coded_values(x, acts)
    if by_piece:
        return reduce(add, (pieces.forward(dot, x, part) for part in q.parts))

    # Decoded again in the backward pass, which keeps no float weight.
    @jax.checkpoint
    def product(x: Any, q: QTensor) -> Any:
        return dot(x, q.matrix(x.dtype, site))

    return product(x, q)


def _values(
    dtype: Any, precision: Any, sizes: Any, x: Any, acts: SiteActs, part: Coded
) -> Any:
    """The products of the values that codes stand for."""

    @jax.checkpoint
    def product(x: Any, part: Coded) -> Any:
        return jax.lax.ragged_dot(
            x, part.decode(x.dtype), sizes, precision, preferred_element_type=dtype
        )

    return product(x if acts.activation is None else coded_values(x, acts), part)


_ragged.__name__ = "qragged_matmul"
ragged_product_of = jax.jit(_ragged, static_argnums=(3, 4, 5, 6, 7))
"""What `ragged_matmul` runs; by piece as `qjax.ops.matmul.product_of`."""


@jax.custom_jvp
def _coded_ragged(x: Any, acts: SiteActs, part: Coded, sizes: Any) -> Any:
    """Codes contracted with codes; the gradient is that of the values."""
    coded, grid, N = code_input(x, acts), part.grid(), part.shape[1]
    assert isinstance(coded.format, Int) and isinstance(part.format, Int)
    tokens = integers(coded.codes, coded.grid, coded.format)[0].T
    experts = integers(part.unpack(), grid, part.format)[0]
    total = jax.lax.ragged_dot(
        tokens, experts, sizes, preferred_element_type=jnp.int32
    ).astype(jnp.float32)
    M, E = x.shape[0], experts.shape[0]
    owner = jnp.repeat(jnp.arange(E), sizes, total_repeat_length=M)
    cols = part.format.granularity.cols or N
    wide = jnp.repeat(grid.scale.astype(jnp.float32)[:, 0], cols, axis=-1)[:, :N]
    steps = jnp.broadcast_to(coded.grid.scale.astype(jnp.float32)[0], (M,))
    return total * steps[:, None] * wide[owner]


@_coded_ragged.defjvp
def _coded_ragged_jvp(primals: Any, tangents: Any) -> Any:
    x, acts, part, sizes = primals

    @jax.checkpoint
    def values(x: Any, acts: SiteActs, part: Coded) -> Any:
        y = jax.lax.ragged_dot(coded_values(x, acts), part.decode(x.dtype), sizes)
        return y.astype(jnp.float32)

    out = _coded_ragged(*primals)
    return out, jax.jvp(values, (x, acts, part), tangents[:3])[1]
