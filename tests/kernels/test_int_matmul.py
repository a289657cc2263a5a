"""The integer kernel, simulated strictly, against float64."""

import re
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.core.formats import Int, token
from qjax.core.packing import pack
from qjax_kernels.int_matmul import Blocks, IntWeight, reference
from qjax_kernels.int_matmul.blocks import choose
from qjax_kernels.int_matmul.pallas_tpu import int_matmul

SUMS = Blocks(8, 128, 256)
OFFSET = Blocks(8, 128, 256, decode="offset")
WEIGHTS = Blocks(8, 256, 256, tile=128, chunk=256, scale_on="weights")


@dataclass(frozen=True)
class Case:
    bits: int
    group: int | None
    zero: str | None = None
    blocks: Blocks = SUMS
    int8: bool = False
    M: int = 16
    K: int = 512
    N: int = 256

    @property
    def id(self):
        tokens = "a8" if self.int8 else self.blocks.decode
        kind = f"{tokens}-{self.blocks.scale_on}"
        shape = f"{self.M}x{self.K}x{self.N}"
        return f"w{self.bits}-g{self.group}-{self.zero}-{kind}-{shape}"


CASES = [
    Case(4, 128),
    Case(4, 128, "int", OFFSET),
    Case(4, None, "int", OFFSET),
    Case(4, 32, "float"),
    Case(4, 32, "int", WEIGHTS),
    Case(2, 128, "int", OFFSET),
    Case(2, 64, "int"),
    Case(3, 128, "int", M=5),
    Case(3, None, "float"),
    Case(3, 64, None, N=130),
    Case(8, 128, "float"),
    Case(8, 64, "int", WEIGHTS),
    Case(4, 128, None, int8=True),
    Case(4, 32, "int", int8=True),
    Case(4, 128, None, WEIGHTS, int8=True),
    Case(4, 32, "int", WEIGHTS, int8=True, M=5),
    Case(8, None, None, int8=True),
    Case(2, 32, K=256, N=128),
    Case(2, None, K=256, N=128),
    Case(3, 32, "int", N=128),
    Case(8, None, K=256, N=128),
    Case(8, 32, "int", K=256, N=128),
    Case(2, 128, "int", int8=True, K=256, N=128),
    Case(4, 128, "int", Blocks(64, 128, 256), M=128, K=256, N=128),
    # Nothing is a multiple of anything.
    Case(4, 32, "int", SUMS, M=5, K=100, N=130),
    Case(4, 64, None, OFFSET, M=1, K=320, N=1),
    Case(4, 64, "int", replace(OFFSET, m=64, k=512), M=21),
    Case(8, 64, "float", SUMS, M=9, K=77, N=140),
    Case(4, 128, "int", SUMS, True, M=3, K=200, N=129),
]


def drawn(case, seed=0):
    """A weight of random codes, and `q`, scales and zeros in float64."""
    draw = np.random.default_rng(seed)
    half = 2 ** (case.bits - 1)
    q = draw.integers(-half, half, (case.K, case.N))
    G = -(-case.K // (case.group or case.K))
    scale = draw.uniform(0.5, 2, (G, case.N)) * 10.0 ** draw.integers(-6, 6, case.N)
    scale = scale.astype(np.float32)
    zero = None
    if case.zero == "int":
        zero = draw.integers(-half, half, (G, case.N)).astype(np.int8)
    if case.zero == "float":
        zero = draw.normal(0, half, (G, case.N)).astype(np.float32)
    return weight_of(case, q, scale, zero), q, scale, zero


def weight_of(case, q, scale, zero):
    unsigned = jnp.asarray(q + 2 ** (case.bits - 1), jnp.uint8)
    codes = pack(unsigned, case.bits) if case.bits < 8 else jnp.asarray(q, jnp.int8)
    zero = None if zero is None else jnp.asarray(zero)
    return IntWeight(codes, jnp.asarray(scale), zero, case.bits, case.group, case.K)


def exact(case, x, q, scale, zero):
    """The product and the sum of its terms' magnitudes, in float64."""
    spread = [
        np.repeat(v.astype(np.float64), case.group or case.K, 0)[: case.K]
        for v in (scale, np.zeros_like(scale) if zero is None else zero)
    ]
    w = (q - spread[1]) * spread[0]
    x = np.asarray(x, np.float64)
    # What the accumulator holds before zero points are taken away.
    held = np.abs(x) @ ((np.abs(q) + np.abs(spread[1]) + 136) * spread[0])
    return x @ w, np.abs(x) @ np.abs(w), held


def product(backend, x, weight, case):
    return backend.run(
        "int_matmul", x, weight, int8_tokens=case.int8, dtype=jnp.float32,
        tpu={"blocks": case.blocks},
    )  # fmt: skip


def agrees(case, backend):
    weight, q, scale, zero = drawn(case)
    x = jax.random.normal(jax.random.key(1), (case.M, case.K), jnp.bfloat16)
    y = np.asarray(product(backend, x, weight, case), np.float64)
    if case.int8:
        codes, steps = reference.quantize_tokens(x)
        x = np.asarray(codes, np.float64) * np.asarray(steps, np.float64)
    true, terms, held = exact(case, x, q, scale, zero)
    bound = 2.0**-8 * terms if case.blocks.scale_on == "weights" else 2.0**-22 * held
    assert np.isfinite(y).all()
    assert (np.abs(y - true) <= bound).all()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_equals_float64(case, backend):
    agrees(case, backend)


@pytest.mark.parametrize("generation", ["v6e", "v7x"])
@pytest.mark.parametrize(
    "case",
    [
        replace(CASES[4], K=256),
        Case(4, 128, "int", int8=True, K=256, N=128),
        Case(4, 128, "int", WEIGHTS, int8=True),
        Case(8, None, None, int8=True, K=256, N=128),
    ],
    ids=lambda c: c.id,
)
def test_other_generations_mean_the_same(generation, case, backend):
    """Scales in bfloat16 on v6e and v7x; v7x contracts int8 codes in bfloat16."""
    agrees(case, backend.simulating(generation))


@pytest.mark.parametrize("case", [CASES[1], CASES[7], CASES[-1]], ids=lambda c: c.id)
def test_the_reference_equals_float64(case):
    weight, q, scale, zero = drawn(case)
    x = jax.random.normal(jax.random.key(1), (case.M, case.K))
    true, _, held = exact(case, x, q, scale, zero)
    y = np.asarray(reference.int_matmul(x, weight), np.float64)
    assert (np.abs(y - true) <= 2.0**-22 * held).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tokens_are_coded_as_the_library_codes_them(dtype):
    x = jax.random.normal(jax.random.key(2), (7, 96)).astype(dtype)
    x = x.at[0].set(0).at[1].mul(1e-37).at[2].mul(2e37)
    codes, scale = reference.quantize_tokens(x)
    format = Int(8, token())
    grid = format.fit(x.T)
    same = np.asarray(grid.scale, np.float32)[0]
    np.testing.assert_array_equal(scale[:, 0], same)
    expected = np.asarray(format.to_codes(x.T, grid).T, np.int32) - 128
    np.testing.assert_array_equal(codes, expected)


@pytest.mark.parametrize(
    "case",
    [CASES[i] for i in (1, 7, 14)]
    + [Case(2, 64, "int", K=256, N=128), Case(4, 32, None, int8=True, K=256, N=128)],
    ids=lambda c: c.id,
)
def test_extreme_scales_zeros_and_stale_memory(case, backend):
    """All-zero groups and tokens, scales at both ends of float32: all stays finite."""
    weight, q, scale, zero = drawn(case)
    q[: case.group or case.K] = 0
    scale[:, 0], scale[:, 1], scale[:, 2] = 1e-38, 1e33, 0
    weight = weight_of(case, q, scale, zero)
    x = jax.random.normal(jax.random.key(3), (case.M, case.K), jnp.bfloat16)
    x = x.at[0].set(0)
    y = np.asarray(product(backend, x, weight, case))
    assert np.isfinite(y).all()
    assert (y[0] == 0).all() and (y[:, 2] == 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 5}, "IntWeight.bits is 5"),
        ({"group": 64}, "IntWeight.scale is float32"),
        ({"K": 500}, "IntWeight.codes is uint32"),
    ],
)
def test_what_does_not_agree_is_named(change, message):
    case = CASES[0]
    weight = replace(drawn(case)[0], **change)
    with pytest.raises(ValueError, match=re.escape(message)):
        reference.int_matmul(jnp.ones((2, case.K)), weight)


def test_too_little_vmem_is_an_error():
    shape = jax.ShapeDtypeStruct
    weight = IntWeight(
        shape((8192, 8192), jnp.int8),
        shape((1, 8192), jnp.float32),
        None,
        8,
        None,
        8192,
    )
    x = shape((4096, 8192), jnp.bfloat16)
    run = partial(int_matmul, generation="v7x", blocks=Blocks(4096, 4096, 8192))
    with pytest.raises(ValueError, match=r"MiB of VMEM; v7x has 64 MiB"):
        jax.eval_shape(run, x, weight)
    with pytest.raises(ValueError, match="TPU generation is 'v2'"):
        jax.eval_shape(partial(run, generation="v2"), x, weight)


def test_unknown_algebra_is_named():
    with pytest.raises(ValueError, match=r"Blocks\.scale_on is 'columns'"):
        Blocks(8, 128, 128, scale_on="columns")
    with pytest.raises(ValueError, match=r"Blocks\.decode is 'table'"):
        Blocks(8, 128, 128, decode="table")
    with pytest.raises(ValueError, match='scale_on must be "sums"'):
        Blocks(8, 128, 128, scale_on="weights", decode="offset")


@pytest.mark.parametrize("M", [420, 500, 511, 700])
def test_fewer_tokens_a_step_are_whole_blocks(M):
    """Llama-3-70B's `down` leaves no room for all of them: a step takes 256."""
    K, N = 28672, 8192
    codes = jax.ShapeDtypeStruct((K // 8, N), jnp.uint32)
    scale = jax.ShapeDtypeStruct((K // 128, N), jnp.bfloat16)
    weight = IntWeight(codes, scale, None, 4, 128, K)
    assert choose("v6e", M, weight, int8_tokens=True).m == 256
