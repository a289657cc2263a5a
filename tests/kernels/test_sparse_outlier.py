"""Outlier features beside int8, simulated strictly, against float64."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
import pytest

from qjax.core.packing import pack
from qjax_kernels.int_matmul import Blocks, IntWeight
from qjax_kernels.sparse_outlier import reference
from qjax_kernels.sparse_outlier.pallas_tpu import chunk_of

THRESHOLD = 6.0


@dataclass(frozen=True)
class Case:
    bits: int
    group: int | None
    zero: bool = False
    M: int = 9
    K: int = 512
    N: int = 256

    @property
    def id(self):
        return f"w{self.bits}-g{self.group}-{self.zero}-{self.K}"


CASES = [Case(8, None), Case(4, 128, True), Case(4, 32, M=3, K=200, N=130)]
BLOCKS = Blocks(8, 128, 512)


def drawn(case, outliers=(5, 300), extreme=False):
    draw = np.random.default_rng(0)
    half = 2 ** (case.bits - 1)
    q = draw.integers(-half, half, (case.K, case.N))
    shape = (-(-case.K // (case.group or case.K)), case.N)
    scale = draw.uniform(0.5, 2, shape).astype(np.float32)
    if extreme:
        q[: case.group or case.K] = 0
        scale[:, 0], scale[:, 1], scale[:, 2] = 1e-38, 1e31, 0
    zero = draw.integers(-half, half, shape).astype(np.int8) if case.zero else None
    unsigned = jnp.asarray(q + half, jnp.uint8)
    codes = pack(unsigned, case.bits) if case.bits < 8 else jnp.asarray(q, jnp.int8)
    weight = IntWeight(
        codes, jnp.asarray(scale), None if zero is None else jnp.asarray(zero),
        case.bits, case.group, case.K,
    )  # fmt: skip
    x = np.clip(draw.normal(size=(case.M, case.K)), -5, 5)
    for column in outliers:
        x[:: 1 + column % 2, column % case.K] *= 40
    spread = [
        np.repeat(v.astype(np.float64), case.group or case.K, 0)[: case.K]
        for v in (scale, np.zeros_like(scale) if zero is None else zero)
    ]
    return jnp.asarray(x, jnp.bfloat16), weight, (q, spread[0], spread[1])


def split(x):
    """Codes, what they are worth, and the features that stay in float."""
    x = np.asarray(x, np.float32)
    reaches = np.abs(x) >= THRESHOLD
    outlier = reaches.any(0)
    steps = np.abs(np.where(reaches, 0, x)).max(1, keepdims=True) / np.float32(127)
    codes = np.round(np.where(outlier, 0, x) / np.where(steps == 0, 1, steps))
    kept = jnp.asarray(np.where(outlier, x, 0), jnp.bfloat16)
    return jnp.asarray(codes, jnp.int8), jnp.asarray(steps), kept


def exact(run, q, scale, zero):
    """The product, and what the accumulators hold, in float64."""
    codes, steps, kept = (np.asarray(v.astype(jnp.float32), np.float64) for v in run)
    values = codes * steps + kept
    size = (np.abs(q) + np.abs(zero)) * scale
    return values @ ((q - zero) * scale), np.abs(values) @ size


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_equals_float64(case, backend):
    x, weight, parts = drawn(case)
    run = split(x)
    y = backend.run(
        "sparse_outlier", *run, weight, dtype=jnp.float32, tpu={"blocks": BLOCKS}
    )
    true, held = exact(run, *parts)
    y = np.asarray(y, np.float64)
    assert (np.abs(y - true) <= 2.0**-21 * held).all()


def test_none_and_nothing_but_outliers(backend):
    """No feature, or every value of a token, reaches: both are finite and right."""
    case = CASES[0]
    x, weight, parts = drawn(case, outliers=())
    x = x.at[0].set(0)
    for each in (x, x.at[1].set(50.0).at[2].set(1e30)):
        run = split(each)
        y = backend.run(
            "sparse_outlier", *run, weight, dtype=jnp.float32, tpu={"blocks": BLOCKS}
        )
        true, held = exact(run, *parts)
        assert (np.abs(np.asarray(y, np.float64) - true) <= 2.0**-21 * held).all()


def test_extreme_scales_and_groups_of_zeros(backend):
    """All-zero groups, scales at both ends of float32, with and without outliers."""
    x, weight, parts = drawn(Case(4, 128, K=256, N=128), (5,), extreme=True)
    run = split(x.at[0].set(0))
    y = backend.run(
        "sparse_outlier", *run, weight, dtype=jnp.float32, tpu={"blocks": BLOCKS}
    )
    true, held = exact(run, *parts)
    y = np.asarray(y, np.float64)
    smallest = 256 * 200 * np.finfo(np.float32).tiny  # below it sums may vanish
    assert (np.abs(y - true) <= 2.0**-21 * held + smallest).all()
    assert (y[0] == 0).all() and (y[:, 2] == 0).all()


def test_the_reference_equals_float64():
    x, weight, parts = drawn(CASES[1])
    run = split(x)
    y = reference.sparse_outlier(*run, weight, dtype=jnp.float32)
    true, held = exact(run, *parts)
    assert (np.abs(np.asarray(y, np.float64) - true) <= 2.0**-21 * held).all()


def test_chunks_hold_whole_groups():
    weight = drawn(CASES[1])[1]
    assert chunk_of(weight, BLOCKS) == 256
    assert chunk_of(weight, Blocks(8, 128, 128)) == 128


def test_what_does_not_agree_is_named():
    x, weight, _ = drawn(CASES[0])
    codes, steps, kept = split(x)
    with pytest.raises(ValueError, match=r"codes are int32; they must be int8"):
        reference.sparse_outlier(codes.astype(jnp.int32), steps, kept, weight)
    with pytest.raises(
        ValueError, match=r"steps has shape \(9,\); it must be \(9, 1\)"
    ):
        reference.sparse_outlier(codes, steps[:, 0], kept, weight)
