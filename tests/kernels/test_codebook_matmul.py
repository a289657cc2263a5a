"""Products with coded levels, simulated strictly, against float64."""

import re
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.core.packing import pack
from qjax_kernels.codebook_matmul import (
    AdditiveWeight,
    CodebookWeight,
    additive,
    reference,
)
from qjax_kernels.scaled import Blocks

SUMS = Blocks(8, 128, 256)
WEIGHTS = Blocks(8, 256, 256, tile=128, chunk=256, scale_on="weights")


@dataclass(frozen=True)
class Case:
    bits: int
    group: int | None
    blocks: Blocks = SUMS
    M: int = 16
    K: int = 512
    N: int = 256
    levels: int | None = None

    @property
    def id(self):
        shape = f"{self.M}x{self.K}x{self.N}"
        return f"{self.bits}-g{self.group}-{self.blocks.scale_on}-{shape}"


CASES = [
    Case(4, 64),
    Case(4, 64, WEIGHTS),
    Case(4, None),
    Case(2, 128),
    Case(2, None, levels=3),
    Case(3, None, levels=7),
    Case(3, 128, N=130),
    Case(4, 64, Blocks(64, 128, 256), M=64, K=256, N=128),
    Case(4, 64, M=5, K=320, N=130),
    Case(4, None, M=1, K=100, N=1),
]


def drawn(case, bfloat16=True):
    """A weight of random codes and `w` in float64."""
    draw = np.random.default_rng(0)
    count = case.levels or 2**case.bits
    levels = np.sort(draw.normal(0, 1, count)).astype(np.float32)
    if bfloat16:
        levels = levels.astype(jnp.bfloat16).astype(np.float32)
    codes = draw.integers(0, count, (case.K, case.N)).astype(np.uint8)
    groups = -(-case.K // (case.group or case.K))
    scale = draw.uniform(0.5, 2, (groups, case.N)) * 10.0 ** draw.integers(
        -6, 6, case.N
    )
    scale = scale.astype(np.float32)
    each = np.repeat(scale.astype(np.float64), case.group or case.K, 0)[: case.K]
    weight = CodebookWeight(
        pack(jnp.asarray(codes), case.bits), jnp.asarray(levels), jnp.asarray(scale),
        case.bits, case.group, case.K,
    )  # fmt: skip
    return weight, levels.astype(np.float64)[codes] * each


def tokens(case):
    return jax.random.normal(jax.random.key(1), (case.M, case.K), jnp.bfloat16)


def product(backend, x, weight, case):
    return backend.run(
        "codebook_matmul", x, weight, dtype=jnp.float32, tpu={"blocks": case.blocks}
    )


def exact(x, w):
    """The product, the sum of its terms' magnitudes, and float32's error in summing."""
    x = np.asarray(x, np.float64)
    terms = np.abs(x) @ np.abs(w)
    return x @ w, terms, 2.0**-24 * (len(w) + 8) * terms


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_equals_float64(case, backend):
    weight, w = drawn(case)
    x = tokens(case)
    y = np.asarray(product(backend, x, weight, case), np.float64)
    true, terms, bound = exact(x, w)
    # Weights times scales are rounded to bfloat16; scales on sums round nothing.
    rounded = case.blocks.scale_on == "weights" and case.group
    bound += 2.0**-9 * terms if rounded else 0
    assert np.isfinite(y).all()
    assert (np.abs(y - true) <= bound).all()


def test_levels_are_rounded_to_bfloat16_and_to_nothing_less(backend):
    case = CASES[0]
    weight, w = drawn(case, bfloat16=False)
    x = tokens(case)
    true, terms, bound = exact(x, w)
    y = np.asarray(product(backend, x, weight, case), np.float64)
    assert (np.abs(y - true) <= bound + 2.0**-9 * terms).all()


@pytest.mark.parametrize(
    "case", [CASES[0], CASES[3], Case(3, 32, K=160)], ids=lambda c: c.id
)
def test_the_reference_equals_float64(case):
    weight, w = drawn(case, bfloat16=False)
    x = tokens(case)
    true, _, bound = exact(x, w)
    y = reference.codebook_matmul(x, weight, dtype=jnp.float32)
    assert (np.abs(np.asarray(y, np.float64) - true) <= bound).all()


def test_extreme_scales_and_zeros_stay_finite(backend):
    case = CASES[0]
    weight, w = drawn(case)
    scale = np.asarray(weight.scale).copy()
    scale[:, 0], scale[:, 1], scale[:, 2] = 1e-38, 1e33, 0
    scale[1] = 0  # a group of zeros has no scale
    w[case.group : 2 * case.group] = 0
    weight = replace(weight, scale=jnp.asarray(scale))
    x = tokens(case).at[0].set(0)
    y = np.asarray(product(backend, x, weight, case))
    assert np.isfinite(y).all()
    assert (y[0] == 0).all() and (y[:, 2] == 0).all()
    true, _, bound = exact(x, w)
    assert (np.abs(y - true) <= bound)[:, 3:].all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 5}, "CodebookWeight.bits is 5"),
        ({"group": 32}, "CodebookWeight.scale is float32"),
        ({"K": 500}, "CodebookWeight.codes is uint32"),
        ({"levels": jnp.ones(17)}, "CodebookWeight.levels has shape (17,)"),
    ],
)
def test_what_does_not_agree_is_named(change, message):
    weight = replace(drawn(CASES[0])[0], **change)
    with pytest.raises(ValueError, match=re.escape(message)):
        reference.codebook_matmul(jnp.ones((2, 512)), weight)


@pytest.mark.parametrize(
    ("books", "entries"), [(1, 65536), (2, 256)], ids=["1x16", "2x8"]
)
def test_sums_of_code_vectors_equal_float64(books, entries):
    """AQLM's two published layouts, vectors of 8."""
    draw = np.random.default_rng(0)
    codes = draw.integers(0, entries, (books, 8, 40))
    vectors = draw.normal(0, 1, (books, entries, 8)).astype(np.float32)
    scale = draw.uniform(0.5, 2, (1, 40)).astype(np.float32)
    kind = np.uint16 if entries > 256 else np.uint8
    weight = AdditiveWeight(
        *(jnp.asarray(a) for a in (codes.astype(kind), vectors, scale))
    )
    w = np.zeros((64, 40))
    for c in range(books):
        for j in range(8):
            w[8 * j : 8 * j + 8] += vectors[c, codes[c, j]].T.astype(np.float64)
    x = jax.random.normal(jax.random.key(0), (3, 64))
    true, terms, _ = exact(x, w * scale)
    for form in (additive.additive_matmul, additive.products_first):
        y = np.asarray(form(x, weight), np.float64)
        # Terms are sums of two vectors, whose magnitudes may be larger than theirs.
        assert (np.abs(y - true) <= 2.0**-16 * terms.max()).all()
