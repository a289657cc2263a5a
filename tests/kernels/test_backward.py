"""`dy @ w^T` in the kernels, simulated strictly, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.core.packing import pack
from qjax_kernels.codebook_matmul import CodebookWeight
from qjax_kernels.codebook_matmul.backward_tpu import codebook_matmul_backward
from qjax_kernels.int_matmul import IntWeight
from qjax_kernels.int_matmul.backward_tpu import int_matmul_backward
from qjax_kernels.scaled import Blocks

BLOCKS = Blocks(8, 128, 256, chunk=128)
INT = [
    (4, 128, None, (16, 512, 256)),
    (4, 32, "int", (16, 512, 256)),
    (8, None, "float", (16, 256, 256)),
    (2, 64, None, (5, 320, 130)),
    (4, 32, None, (3, 100, 7)),
]


def grids(bits, group, zero, K, N, draw):
    groups = -(-K // (group or K))
    scale = draw.uniform(0.5, 2, (groups, N)) * 10.0 ** draw.integers(-6, 6, (1, N))
    half = 2 ** (bits - 1)
    found = None
    if zero == "int":
        found = draw.integers(-half, half, (groups, N)).astype(np.int8)
    if zero == "float":
        found = draw.normal(0, half, (groups, N)).astype(np.float32)
    return scale.astype(np.float32), found


def spread(values, group, K):
    return np.repeat(values.astype(np.float64), group or K, 0)[:K]


def agrees(dx, dy, w):
    """To the rounding of weights, at most two roundings, to bfloat16."""
    dy = np.asarray(dy, np.float64)
    terms = np.abs(dy) @ np.abs(w).T
    bound = (2.0**-8 + 2.0**-24 * (w.shape[1] + 8)) * terms
    dx = np.asarray(dx, np.float64)
    assert np.isfinite(dx).all()
    assert (np.abs(dx - dy @ w.T) <= bound).all()


def options(backend):
    if backend.name != "tpu":
        pytest.skip("no backward kernel for this hardware")
    return backend.options


@pytest.mark.parametrize(("bits", "group", "zero", "shape"), INT)
def test_integers_equal_float64(bits, group, zero, shape, backend):
    integers(bits, group, zero, shape, backend)


def integers(bits, group, zero, shape, backend, *, extreme=False):
    M, K, N = shape
    draw = np.random.default_rng(0)
    half = 2 ** (bits - 1)
    q = draw.integers(-half, half, (K, N))
    scale, found = grids(bits, group, zero, K, N, draw)
    if extreme:
        q[: group or K] = 0
        scale[:, 0], scale[:, 1], scale[:, 2] = 1e-38, 1e33, 0
    unsigned = jnp.asarray(q + half, jnp.uint8)
    codes = pack(unsigned, bits) if bits < 8 else jnp.asarray(q, jnp.int8)
    weight = IntWeight(codes, jnp.asarray(scale), found, bits, group, K)
    dy = jax.random.normal(jax.random.key(1), (M, N), jnp.bfloat16)
    dx = int_matmul_backward(
        dy, weight, dtype=jnp.float32, blocks=BLOCKS, **options(backend)
    )
    shift = 0 if found is None else spread(found, group, K)
    agrees(dx, dy, (q - shift) * spread(scale, group, K))
    return dx


def test_extreme_scales_and_groups_of_zeros(backend):
    """Each output has its scale, and all outputs meet in every sum."""
    dx = integers(4, 32, None, (16, 128, 128), backend, extreme=True)
    assert (np.asarray(dx)[:, :32] == 0).all()


@pytest.mark.parametrize(
    ("bits", "group", "shape"),
    [(4, 64, (16, 512, 256)), (2, None, (16, 512, 256)), (4, 64, (3, 320, 130))],
)
def test_levels_equal_float64(bits, group, shape, backend):
    M, K, N = shape
    draw = np.random.default_rng(0)
    levels = np.sort(draw.normal(0, 1, 2**bits)).astype(jnp.bfloat16)
    codes = draw.integers(0, 2**bits, (K, N)).astype(np.uint8)
    scale, _ = grids(bits, group, None, K, N, draw)
    weight = CodebookWeight(
        pack(jnp.asarray(codes), bits), jnp.asarray(levels, jnp.float32),
        jnp.asarray(scale), bits, group, K,
    )  # fmt: skip
    dy = jax.random.normal(jax.random.key(1), (M, N), jnp.bfloat16)
    dx = codebook_matmul_backward(
        dy, weight, dtype=jnp.float32, blocks=BLOCKS, **options(backend)
    )
    agrees(dx, dy, levels.astype(np.float64)[codes] * spread(scale, group, K))
