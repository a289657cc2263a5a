"""The XLA form for TPUs: scales on the sums of groups, weights never written out.

A TPU's compiler takes words reinterpreted as narrow integers straight into the matrix
unit, and puts scales into the same fusion when they multiply the sums. Scales on the
weights would make it write a float copy of them to memory.
"""

from typing import Any

import jax
import jax.numpy as jnp

from qjax.core.coded import Coded
from qjax.core.formats import Int
from qjax.core.packing import WORD
from qjax.core.qtensor import Activation, SiteActs
from qjax.ops.activations import code_input, integers

NARROW = {2: jnp.int2, 4: jnp.int4}


def has_sums(part: Coded) -> bool:
    """Whether the form takes a part: whole groups of whole words along K."""
    format, K = part.format, part.shape[0]
    if not isinstance(format, Int) or format.bits not in (2, 4, 8):
        return False
    group = format.granularity.rows or K
    whole = K % group == 0 and (format.bits == 8 or group * format.bits % WORD == 0)
    return whole and format.granularity.cols == 1 and not part.lead


def has_coded_sums(part: Coded, activation: Activation) -> bool:
    """Whether the form takes a part with int8 tokens; one group needs no sums of them.

    A scan over groups, the other form, would leave each device of a sharded K with one
    group at a time, and the weights of all others to be sent.
    """
    coded, several = activation.format, part.format.granularity.rows is not None
    if not isinstance(coded, Int) or coded.granularity.rows is not None:
        return False
    tokens = bool(coded.symmetric) and coded.bits <= 8
    return several and tokens and activation.outliers is None and has_sums(part)


def sums_product(x: Any, part: Coded, dtype: Any, precision: Any = None) -> jax.Array:
    """`x[M, K]` times the part, `[M, N]`, accumulated in float32.

    `sum_g scale_g (x_g @ q_g - xsum_g zero_g)`; the backward pass decodes again.
    """

    @jax.checkpoint
    def product(x: Any, part: Coded) -> Any:
        grid, format = part.grid(), part.format
        assert isinstance(format, Int)
        q = _by_word(part, grid.scale.shape[0])
        xs = x.reshape(x.shape[0], q.shape[0], q.shape[1], q.shape[3])
        y = jnp.einsum(
            "mgwp,gwnp->gmn", xs, q.astype(x.dtype), precision=precision,
            preferred_element_type=jnp.float32,
        )  # fmt: skip
        if not format.symmetric:
            zero = grid.zero.astype(jnp.float32) - format.half
            sums = xs.astype(jnp.float32).sum((2, 3)).T
            y = y - sums[:, :, None] * zero[:, None]
        y = y * grid.scale.astype(jnp.float32)[:, None]
        return y.sum(0).astype(dtype)

    return product(x, part)


def coded_sums_product(x: Any, acts: SiteActs, part: Coded) -> jax.Array:
    """`x[M, K]`, coded by token, times the part: int8 into int32 for each group.

    `sx * sum_g scale_g (u_g @ q_g - usum_g zero_g)`, float32 `[M, N]`.
    """
    coded, grid, format = code_input(x, acts), part.grid(), part.format
    assert isinstance(format, Int) and isinstance(coded.format, Int)
    q = _by_word(part, grid.scale.shape[0])
    codes, _ = integers(coded.codes, coded.grid, coded.format)
    xs = codes.T.reshape(x.shape[0], q.shape[0], q.shape[1], q.shape[3])
    y = jnp.einsum(
        "mgwp,gwnp->gmn", xs, q.astype(jnp.int8), preferred_element_type=jnp.int32
    ).astype(jnp.float32)
    if not format.symmetric:
        zero = grid.zero.astype(jnp.float32) - format.half
        sums = jnp.sum(xs, axis=(2, 3), dtype=jnp.int32).astype(jnp.float32).T
        y = y - sums[:, :, None] * zero[:, None]
    y = y * grid.scale.astype(jnp.float32)[:, None]
    return y.sum(0) * coded.grid.scale.astype(jnp.float32).T


def _by_word(part: Coded, groups: int) -> jax.Array:
    """Signed codes as `[G, words, N, codes of a word]`, reinterpreted, not unpacked."""
    format, N = part.format, part.shape[1]
    assert isinstance(format, Int)
    if format.bits == 8:
        return part.codes.reshape(groups, -1, N, 1)
    fields = WORD // format.bits
    flip = sum(1 << (format.bits * i + format.bits - 1) for i in range(fields))
    words = part.codes ^ jnp.uint32(flip)
    narrow = jax.lax.bitcast_convert_type(words, NARROW[format.bits])
    return narrow.reshape(groups, -1, N, fields)
