"""Outlier features stay in float beside int8: LLM.int8() (Dettmers et al., 2022).

https://arxiv.org/abs/2208.07339, equation 8: `X W = X_O W_O + S (X_R W_R)`, with `O`
the features that reach the threshold somewhere in the batch and `R` the others. The
scales `S` of the tokens are those of bitsandbytes: taken over all values below the
threshold, also those of the features in `O`. Values reach it as they are coded: brought
to float16 first where the format says so.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qjax.core.coded import Coded
from qjax.core.formats import Int
from qjax.core.qtensor import Activation, SiteActs
from qjax.ops.activations import code_input, integers
from qjax.ops.kernels import int_weight
from qjax_kernels.sparse_outlier.pallas_tpu import sparse_outlier

Product = Callable[[Any, Any, SiteActs, Coded], Any]


def split_outliers(x: Any, acts: SiteActs) -> tuple[Any, Any, SiteActs]:
    """`x[..., M, K]` as the sum of a part to be coded and one to stay in float.

    The features are found anew in every batch, so neither part can have fewer columns:
    both are as wide as `x`, with zeros in place of the other's features, and the float
    part meets the whole decoded weight. Shapes are static; what is saved is error, not
    time, but where a kernel leaves out the chunks of features that hold no outlier.

    Returns:
      The part to be coded, the part in float (None if the site keeps no outliers), and
      the record that codes the first on the scales of this batch.
    """
    activation = acts.activation
    if activation is None or activation.outliers is None:
        return x, None, acts
    zero = jnp.zeros((), x.dtype)
    # NaN reaches no threshold: it stays in the coded part, whose scale it marks.
    rule = getattr(activation.format, "scale_rule", "ct")
    seen = x.astype(jnp.float16) if rule == "float16" else x
    reaches = jnp.abs(seen) >= jnp.asarray(activation.outliers, seen.dtype)
    outlier = jnp.any(reaches, axis=-2, keepdims=True)
    below = lax.stop_gradient(jnp.where(reaches, zero, x))
    grid = activation.format.fit(jnp.swapaxes(below, -1, -2))
    found = Activation(activation.format, dynamic=False)
    rest = replace(acts, activation=found, scale=grid.scale, zero=grid.zero)
    return jnp.where(outlier, zero, x), jnp.where(outlier, x, zero), rest


@partial(jax.custom_jvp, nondiff_argnums=(4, 5, 6))
def kept_product(
    x: Any,
    kept: Any,
    acts: SiteActs,
    part: Coded,
    dtype: Any,
    generation: str,
    values: Product,
) -> Any:
    """What `split_outliers` gave times the part, on a kernel.

    The gradient is that of `values`.
    """
    coded = code_input(x, acts)
    assert isinstance(coded.format, Int)
    codes = integers(coded.codes, coded.grid, coded.format)[0].T
    steps = jnp.broadcast_to(
        coded.grid.scale.astype(jnp.float32).reshape(-1, 1), (x.shape[0], 1)
    )
    return sparse_outlier(
        codes, steps, kept, int_weight(part), generation=generation, dtype=dtype
    )


@kept_product.defjvp
def _kept_product_jvp(
    dtype: Any, generation: str, values: Product, primals: Any, tangents: Any
) -> Any:
    out = kept_product(*primals, dtype, generation, values)
    return out, jax.jvp(values, primals, tangents)[1]
