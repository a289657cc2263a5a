"""Quantized experts on the kernels of `qjax_kernels`: which can run, and running them.

XLA has a grouped kernel of its own on TPUs, which takes float or int8 experts: narrower
ones are decoded into memory first, and the scales of int8 ones follow in passes over
the result.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from qjax.core.coded import Coded
from qjax.core.qtensor import QTensor, SiteActs
from qjax.ops.kernels import (
    Choice,
    int_weight,
    unfit_format,
    unfit_target,
    unfit_tokens,
)
from qjax.ops.packed import Packed
from qjax.ops.targets import Target
from qjax_kernels.compat import chip
from qjax_kernels.int_matmul import blocks
from qjax_kernels.ragged_matmul import pallas_tpu
from qjax_kernels.ragged_matmul.reference import one_expert

Product = Callable[[Any, SiteActs, Coded], Any]


def ragged_choice(
    q: QTensor, site: int, x: Any, implementation: str, target: Target
) -> Choice:
    """How a site of experts runs, for `x[M, K]`.

    Raises:
      ValueError: `implementation` is "pallas" and there is no kernel.
    """
    if implementation == "xla":
        return Choice("xla", refused="XLA was asked for")
    why = unfit(q, site, x, target)
    if why and implementation == "pallas":
        raise ValueError(f'implementation is "pallas", but {why}')
    if why:
        return Choice("xla", refused=why)
    coded = q.site(site).activation is not None
    whole = chip(str(target.generation)).is_matmul_supported(jnp.int8, jnp.int8)
    return Choice("pallas", target.generation, floats=coded and not whole)


def unfit(q: QTensor, site: int, x: Any, target: Target) -> str:
    """Why no kernel takes the site; empty if one does."""
    activation = q.site(site).activation
    part, *others = q.parts
    if others or not q.plain:
        return "the kernel takes experts of one coded part alone"
    if isinstance(part, Packed):
        return f"the weight is packed in {part.order}, for other hardware"
    if activation is not None and activation.outliers is not None:
        return "only dot sites keep outlier features in float"
    why = unfit_target(target) or unfit_format(part) or unfit_tokens(x, activation)
    return why or _unfit_size(part, x, activation is not None, target.generation)


def _unfit_size(part: Coded, x: Any, coded: bool, generation: Any) -> str:
    experts = jax.eval_shape(int_weight, part)
    chosen = pallas_tpu.choose(generation, x.shape[0], experts, coded)
    return blocks.too_large(generation, chosen, one_expert(experts))


@partial(jax.custom_jvp, nondiff_argnums=(4, 5, 6))
def ragged_product(
    x: Any,
    acts: SiteActs,
    part: Coded,
    sizes: Any,
    dtype: Any,
    generation: str,
    values: Product,
) -> Any:
    """Rows of `x` times their experts on a kernel; the gradient is that of `values`."""
    return pallas_tpu.ragged_matmul(
        x,
        int_weight(part),
        sizes,
        generation=generation,
        int8_tokens=acts.activation is not None,
        dtype=dtype,
    )


@ragged_product.defjvp
def _ragged_product_jvp(
    dtype: Any, generation: str, values: Product, primals: Any, tangents: Any
) -> Any:
    out = ragged_product(*primals, dtype, generation, values)
    x, acts, part, sizes = primals
    of_sizes = partial(values, sizes)
    return out, jax.jvp(of_sizes, (x, acts, part), tangents[:3])[1]
