"""Grouped products, simulated strictly, against float64; the order of visits."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.core.packing import pack
from qjax_kernels.int_matmul import Blocks, IntWeight
from qjax_kernels.int_matmul.reference import quantize_tokens
from qjax_kernels.ragged_matmul import reference
from qjax_kernels.ragged_matmul.visits import visits

SUMS = Blocks(8, 128, 256)
OFFSET = Blocks(8, 128, 256, decode="offset")
WEIGHTS = Blocks(8, 256, 256, tile=128, chunk=256, scale_on="weights")
SIZES = [(3, 0, 5, 9), (0, 0, 20, 0), (20, 0, 0, 0), (1, 1, 1, 1), (0, 0, 0, 0)]
SIZES += [(8, 8, 4, 0), (5, 5, 5, 5), (0, 7, 0, 13)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("m", [1, 8, 20])
def test_visits_cover_every_row_once(sizes, m):
    rows, E = 20, len(sizes)
    found = visits(jnp.array(sizes, jnp.int32), rows, m)
    owner = np.repeat(np.arange(E), sizes)
    seen = np.full(rows, -1)
    blocks = np.asarray(found.block)[: int(found.count)]
    for v, block in enumerate(blocks):
        own = np.arange(block * m, min((block + 1) * m, rows))
        own = own[(own >= found.first[v]) & (own < found.stop[v])]
        assert (seen[own] == -1).all()
        seen[own] = found.expert[v]
    np.testing.assert_array_equal(seen[: len(owner)], owner)
    assert (seen[len(owner) :] == -1).all()
    # A block's visits follow each other, and every block has one.
    np.testing.assert_array_equal(np.unique(blocks), np.arange(-(-rows // m)))
    assert (np.diff(blocks) >= 0).all()


@dataclass(frozen=True)
class Case:
    bits: int
    group: int | None
    zero: str | None = None
    blocks: Blocks = SUMS
    int8: bool = False
    sizes: tuple = (3, 0, 5, 9)
    M: int = 20
    K: int = 256
    N: int = 256

    @property
    def id(self):
        kind = "a8" if self.int8 else self.blocks.decode + "-" + self.blocks.scale_on
        return f"w{self.bits}-g{self.group}-{self.zero}-{kind}-{self.M}-{self.sizes}"


CASES = [
    Case(4, 128),
    Case(4, 128, "int", OFFSET, sizes=(0, 13, 7, 0)),
    Case(4, 64, "float", WEIGHTS),
    Case(2, None, "int", OFFSET),
    Case(8, None, None, Blocks(32, 256, 128), True),
    Case(4, 128, "int", Blocks(16, 128, 128), True, sizes=(20, 0, 0, 0)),
    Case(4, 32, "int", Blocks(4, 128, 128), sizes=(4, 1, 0, 2), M=9, K=100, N=130),
    Case(8, 128, None, sizes=(0, 0, 0, 0)),
]


def drawn(case, seed=0):
    """Experts of random codes, and `q`, scales and zeros in float64."""
    draw = np.random.default_rng(seed)
    half, E = 2 ** (case.bits - 1), len(case.sizes)
    q = draw.integers(-half, half, (E, case.K, case.N))
    shape = (E, -(-case.K // (case.group or case.K)), case.N)
    scale = draw.uniform(0.5, 2, shape) * 10.0 ** draw.integers(-6, 6, case.N)
    scale = scale.astype(np.float32)
    zero = None
    if case.zero == "int":
        zero = draw.integers(-half, half, shape).astype(np.int8)
    if case.zero == "float":
        zero = draw.normal(0, half, shape).astype(np.float32)
    return experts_of(case, q, scale, zero), q, scale, zero


def experts_of(case, q, scale, zero):
    unsigned = jnp.asarray(q + 2 ** (case.bits - 1), jnp.uint8)
    codes = pack(unsigned, case.bits) if case.bits < 8 else jnp.asarray(q, jnp.int8)
    zero = None if zero is None else jnp.asarray(zero)
    return IntWeight(codes, jnp.asarray(scale), zero, case.bits, case.group, case.K)


def exact(case, x, q, scale, zero):
    """The products and the sums of what accumulators hold, in float64."""
    length = case.group or case.K
    scale, zero = (
        np.repeat(v.astype(np.float64), length, 1)[:, : case.K]
        for v in (scale, np.zeros_like(scale) if zero is None else zero)
    )
    y = np.zeros((case.M, case.N))
    terms, held = np.zeros_like(y), np.zeros_like(y)
    owner = np.repeat(np.arange(len(case.sizes)), case.sizes)
    for row, e in enumerate(owner):
        w = (q[e] - zero[e]) * scale[e]
        y[row], terms[row] = x[row] @ w, np.abs(x[row]) @ np.abs(w)
        size = (np.abs(q[e]) + np.abs(zero[e]) + 136) * scale[e]
        held[row] = np.abs(x[row]) @ size
    return y, terms, held


def run(backend, case, x, experts):
    sizes = jnp.array(case.sizes, jnp.int32)
    y = backend.run(
        "ragged_matmul", x, experts, sizes, int8_tokens=case.int8, dtype=jnp.float32,
        tpu={"blocks": case.blocks},
    )  # fmt: skip
    return np.asarray(y, np.float64)


def agrees(case, backend):
    experts, q, scale, zero = drawn(case)
    x = jax.random.normal(jax.random.key(1), (case.M, case.K), jnp.bfloat16)
    y = run(backend, case, x, experts)
    values = np.asarray(x, np.float64)
    if case.int8:
        codes, steps = quantize_tokens(x)
        values = np.asarray(codes, np.float64) * np.asarray(steps, np.float64)
    true, terms, held = exact(case, values, q, scale, zero)
    bound = 2.0**-8 * terms if case.blocks.scale_on == "weights" else 2.0**-22 * held
    assert np.isfinite(y).all()
    assert (np.abs(y - true) <= bound).all()
    assert (y[sum(case.sizes) :] == 0).all()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_equals_float64(case, backend):
    agrees(case, backend)


@pytest.mark.parametrize("generation", ["v6e", "v7x"])
@pytest.mark.parametrize(
    "case",
    [
        Case(4, 64, "int", WEIGHTS, sizes=(3, 6), M=9),
        Case(4, 128, "int", Blocks(16, 128, 256), True, sizes=(3, 6), M=9, N=128),
    ],
    ids=lambda case: case.id,
)
def test_other_generations_mean_the_same(generation, case, backend):
    """Scales in bfloat16 on v6e and v7x; v7x contracts int8 codes in bfloat16."""
    agrees(case, backend.simulating(generation))


@pytest.mark.parametrize("case", [CASES[1], CASES[6]], ids=lambda case: case.id)
def test_the_reference_equals_float64(case):
    experts, q, scale, zero = drawn(case)
    x = jax.random.normal(jax.random.key(1), (case.M, case.K))
    sizes = jnp.array(case.sizes, jnp.int32)
    y = reference.ragged_matmul(x, experts, sizes)
    true, _, held = exact(case, np.asarray(x, np.float64), q, scale, zero)
    assert (np.abs(np.asarray(y, np.float64) - true) <= 2.0**-22 * held).all()


@pytest.mark.parametrize("case", [CASES[1], CASES[4]], ids=lambda case: case.id)
def test_extreme_scales_and_zeros(case, backend):
    """All-zero groups and tokens, scales at both ends of float32: all stays finite."""
    _, q, scale, zero = drawn(case)
    q[:, : case.group or case.K] = 0
    scale[..., 0], scale[..., 1], scale[..., 2] = 1e-38, 1e33, 0
    x = jax.random.normal(jax.random.key(3), (case.M, case.K), jnp.bfloat16)
    x = x.at[0].set(0)
    y = run(backend, case, x, experts_of(case, q, scale, zero))
    assert np.isfinite(y).all()
    assert (y[0] == 0).all() and (y[:, 2] == 0).all()


def test_what_does_not_agree_is_named():
    case = CASES[0]
    experts = drawn(case)[0]
    x, sizes = jnp.ones((case.M, case.K)), jnp.array(case.sizes, jnp.int32)
    with pytest.raises(ValueError, match=r"sizes is int32\[3\]; it must be int32\[4\]"):
        reference.ragged_matmul(x, experts, sizes[:3])
    with pytest.raises(ValueError, match=r"IntWeight\.scale has 2 experts; codes have"):
        reference.ragged_matmul(x, replace(experts, scale=experts.scale[:2]), sizes)
    with pytest.raises(ValueError, match="experts lead three axes"):
        reference.ragged_matmul(x, replace(experts, codes=experts.codes[0]), sizes)
