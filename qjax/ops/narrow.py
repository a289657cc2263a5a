"""The XLA form for GPUs: scales on weights, which stay narrow until multiplied.

A GPU's compiler takes an array of int4 or int8, its scales and the product into one
kernel, if one option is set and the codes are an array as they stand: words that are
taken apart first are written out. JAX takes options of the compiler on the outermost
`jit` only, so the caller gives them:

    jax.jit(step, compiler_options=qjax.GPU_COMPILER_OPTIONS)

Without the option the decoded weight is written to memory and read back. With it, JAX
0.10.2 does so for 8 to 64 tokens only if it is also made to split the contracted axis.
"""

from typing import Any

import jax
import jax.numpy as jnp

from qjax.core.coded import Coded
from qjax.core.formats import Int
from qjax.core.qtensor import Activation, SiteActs
from qjax.ops.activations import code_input, integers
from qjax.ops.packed import NARROW, Packed, narrow_tokens

GPU_COMPILER_OPTIONS = {
    "xla_gpu_experimental_enable_subchannel_dequantisation_fusion": True
}
"""For `jax.jit(f, compiler_options=...)` around a program on a GPU."""

GPU_DECODE_OPTIONS = {
    **GPU_COMPILER_OPTIONS,
    "xla_gpu_experimental_force_split_k": 1,
}
"""The same for 8 to 64 tokens."""


def is_narrow(part: Coded) -> bool:
    """Whether the form takes a part: an array of int4 or int8 in whole groups."""
    format, K = part.format, part.shape[0]
    if not isinstance(format, Int) or part.lead or format.granularity.cols != 1:
        return False
    plain = format.bits == 8 and not isinstance(part, Packed)
    stored = plain or (isinstance(part, Packed) and part.order == NARROW)
    return stored and K % (format.granularity.rows or K) == 0


def has_narrow(part: Coded, activation: Activation | None) -> bool:
    """Whether the form takes a part with a site's tokens, as they are or in integers.

    Coded tokens meet groups this way; whole channels of int8 have a product of their
    own.
    """
    if activation is None:
        return is_narrow(part)
    grouped = part.format.granularity.rows is not None
    return grouped and narrow_tokens(activation) and is_narrow(part)


def coded_narrow_product(x: Any, acts: SiteActs, part: Coded) -> jax.Array:
    """`x[M, K]`, coded by token, times the part, float32 `[M, N]`.

    Codes of 8 bits are exact in bfloat16; weights are rounded to the dtype of `x`. A
    product of integers would be one for each group, and a loop over these.
    """
    coded = code_input(x, acts)
    assert isinstance(coded.format, Int)
    codes, _ = integers(coded.codes, coded.grid, coded.format)
    y = narrow_product(codes.T.astype(x.dtype), part, jnp.float32)
    return y * coded.grid.scale.astype(jnp.float32).T


def narrow_product(x: Any, part: Coded, dtype: Any, precision: Any = None) -> jax.Array:
    """`x[M, K]` times the part, `[M, N]`, accumulated in float32.

    `x @ (q scale) - xsum (zero scale)`: zero points are a small product beside the
    large one, so that they do not stand between codes and fusion. The backward pass
    decodes again.
    """

    @jax.checkpoint
    def product(x: Any, part: Coded) -> Any:
        format, grid = part.format, part.grid()
        assert isinstance(format, Int)
        (K, N), G = part.shape, grid.scale.shape[0]
        scale = grid.scale.astype(x.dtype)
        if isinstance(part, Packed):  # along K
            w = part.codes.reshape(N, G, K // G).astype(x.dtype) * scale.T[..., None]
            w = w.reshape(N, K)
        else:
            w = part.codes.reshape(G, K // G, N).astype(x.dtype) * scale[:, None]
            w = w.reshape(K, N).T
        y = jax.lax.dot_general(
            x,
            w,
            (((1,), (1,)), ((), ())),
            precision=precision,
            preferred_element_type=jnp.float32,
        )
        if not format.symmetric:
            sums = x.astype(jnp.float32).reshape(x.shape[0], G, K // G).sum(-1)
            zero = grid.zero.astype(jnp.float32) - format.half
            zero = zero * scale.astype(jnp.float32)
            y = y - jnp.matmul(sums, zero, precision="highest")
        return y.astype(dtype)

    return product(x, part)
