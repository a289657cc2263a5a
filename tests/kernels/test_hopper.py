"""The kernel for Hopper, without one: its arithmetic in numpy, and its lowering.

`simulated` does what `warpgroups.py` does, thread by thread, with the operands, the
schedule and the places that the kernel itself uses. What it reads from the words goes
where the PTX ISA says that a register of the left operand lies.
"""

import re
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.export
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from qjax_kernels.int_matmul import IntWeight, reference
from qjax_kernels.int_matmul.fragments import TiledWeight, pieces, read_at_once, tiled
from qjax_kernels.int_matmul.launch import Launch, choose, shared_bytes, table
from qjax_kernels.int_matmul.pallas_gpu import added, int_matmul, operands
from qjax_kernels.int_matmul.stripes import stripes
from qjax_kernels.int_matmul.warpgroups import Plan

BFLOAT16 = ml_dtypes.bfloat16
SUMS, WEIGHTS = Launch(16, 2, 4), Launch(8, 2, 3, "weights")


@dataclass(frozen=True)
class Case:
    bits: int
    group: int | None
    zero: str | None = None
    launch: Launch = SUMS
    M: int = 16
    K: int = 256
    N: int = 128

    @property
    def id(self):
        shape = f"{self.M}x{self.K}x{self.N}"
        return f"w{self.bits}-g{self.group}-{self.zero}-{self.launch.scale_on}-{shape}"


CASES = [
    Case(4, 128),
    Case(4, 32, "int8"),
    Case(4, 64, "float32", K=384, N=256),
    Case(4, None, "int8"),
    Case(4, 256, K=512),
    Case(2, 128, "int8"),
    Case(3, 64),
    Case(8, 128, "float32"),
    Case(8, None),
    Case(4, 128, None, WEIGHTS),
    Case(4, 32, "int8", WEIGHTS),
    Case(3, None, "int8", WEIGHTS),
    Case(8, 64, "float32", WEIGHTS),
    # Nothing is a multiple of anything, and sums are cut.
    Case(4, 64, "int8", Launch(8, 2, 2), M=9, K=330, N=200),
    Case(3, 32, None, WEIGHTS, M=3, K=200, N=70),
]


def drawn(case):
    """A packed weight of random codes, and `q`, scales and zeros spread over K."""
    draw = np.random.default_rng(case.bits)
    half, group = 2 ** (case.bits - 1), case.group or case.K
    q = draw.integers(-half, half, (case.K, case.N))
    shape = -(-case.K // group), case.N
    scale = draw.uniform(0.5, 2, shape) * 10.0 ** draw.integers(-6, 6, case.N)
    zero = None
    if case.zero is not None:
        zero = draw.normal(0, half / 2, shape).round(3 * (case.zero == "float32"))
        zero = zero.astype(case.zero)
    weight = packed(case, q, scale.astype(np.float32), zero)
    values = scale.astype(np.float32), 0 * scale if zero is None else zero
    return weight, q, *(v.repeat(group, 0)[: case.K].astype(float) for v in values)


def packed(case, q, scale, zero):
    whole = case.bits == 8
    codes = jnp.asarray(q + (0 if whole else 2 ** (case.bits - 1)))
    codes = codes.astype(jnp.int8 if whole else jnp.uint8)
    zero = None if zero is None else jnp.asarray(zero)
    return tiled(codes, jnp.asarray(scale), zero, case.bits, case.group)


def tokens_of(case):
    return jax.random.normal(jax.random.key(1), (case.M, case.K), jnp.bfloat16)


def fragment(words, bits):
    """A tile's words to its values, by thread and register, as the kernel decodes."""
    at_once, (count, threads) = read_at_once(bits), words.shape
    of_thread = words.reshape(-1, threads, at_once).transpose(1, 0, 2)
    of_thread = of_thread.reshape(threads, count)
    values = np.zeros((64, 128), BFLOAT16)
    thread = np.arange(threads)
    warp, lane = thread // 32, thread % 32
    for pair, parts in enumerate(pieces(bits)):
        step, register = divmod(pair, 4)
        low, high = decoded(of_thread, parts, bits)
        row = 16 * warp + lane // 4 + (8 if register in (1, 3) else 0)
        column = 16 * step + 2 * (lane % 4) + (8 if register in (2, 3) else 0)
        values[row, column], values[row, column + 1] = low, high
    return values


def decoded(words, parts, bits):
    """A pair of codes by masks and one exact subtraction in bfloat16."""
    pair = np.full(len(words), 0x43004300, np.uint32)
    minus = np.full(len(words), 0x43004300, np.uint32)
    for word, shift, mask in parts:
        field = words[:, word] >> np.uint32(shift)
        if bits == 8:
            pair |= field & np.uint32(0x7F007F)
            minus |= field & np.uint32(0x800080)
        else:
            pair |= field & np.uint32(mask * 0x10001)
            minus = np.full_like(minus, 0x43004300 + 2 ** (bits - 1) * 0x10001)
    halves = [
        [(w >> np.uint32(16 * h)).astype(np.uint16).view(BFLOAT16) for h in (0, 1)]
        for w in (pair, minus)
    ]
    return [a - b for a, b in zip(*halves)]


def part(array, index):
    """What a copy brings; zeros beyond the array's end."""
    index = [i if hasattr(i, "size") and hasattr(i, "start") else int(i) for i in index]
    shape = [i.size for i in index if not isinstance(i, int)]
    found = np.zeros((*shape, *array.shape[len(index) :]), array.dtype)
    cut = tuple(
        i if isinstance(i, int) else slice(int(i.start), int(i.start) + i.size)
        for i in index
    )
    there = array[cut]
    found[tuple(slice(size) for size in there.shape)] = there
    return found


def unit(given, plan, number, warpgroup):
    """One unit's share of 64 outputs' sums, `[64, tokens]`, in float32."""
    sources = plan.sources(number)
    got = {name: part(np.asarray(given[name]), sources[name]) for name in given}
    q = fragment(got["codes"][warpgroup], plan.bits)
    own = slice(64 * warpgroup, 64 * warpgroup + 64)
    total = np.zeros((64, plan.launch.tokens), np.float32)
    for row in range(plan.rows):
        columns = slice(row * plan.group, (row + 1) * plan.group)
        x = got["x"][:, columns].astype(np.float64).T
        w, scale = q[:, columns], got["scale"][row, own][:, None]
        zero = got["zero"][row, own][:, None] if "zero" in got else None
        if plan.on_sums:
            y = (w.astype(np.float64) @ x).astype(np.float32)
            if zero is not None:
                sums = got["x_sums"][row, : plan.launch.tokens]
                y = y - sums * zero.astype(np.float32)
            total += y * scale.astype(np.float32)
        else:
            w = w if zero is None else w - zero.astype(BFLOAT16)
            w = w * scale.astype(BFLOAT16)
            total += (w.astype(np.float64) @ x).astype(np.float32)
    return total


def simulated(x, weight, launch):
    """The whole kernel; memory that no program writes holds NaN."""
    plan = Plan.of(x.shape[0], weight, launch.fitted(weight), jnp.dtype("float32"))
    given, cut = operands(x, weight, plan), plan.stripes
    N = given["scale"].shape[1]
    rows = cut.token_blocks * launch.tokens
    out = np.full((cut.slots, -(-N // launch.outputs) * launch.outputs, rows), np.nan)
    for program in range(cut.programs):
        first = program * cut.each
        last = min(first + cut.each, cut.units)
        for tile in range(first // cut.steps, (last - 1) // cut.steps + 1):
            units = range(
                max(first, tile * cut.steps), min(last, (tile + 1) * cut.steps)
            )
            output, block = divmod(tile, cut.token_blocks)
            slot = program - tile * cut.steps // cut.each
            for group in range(launch.warpgroups):
                y = sum(unit(given, plan, number, group) for number in units)
                start = output * launch.outputs + 64 * group
                columns = slice(block * launch.tokens, (block + 1) * launch.tokens)
                assert np.isnan(out[slot, start : start + 64, columns]).all()
                out[slot, start : start + 64, columns] = y
    y = added(jnp.asarray(out[:, :N], jnp.float32), plan)
    return np.asarray(y)[: x.shape[0], : weight.N]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_the_simulated_kernel_equals_float64(case):
    weight, q, scale, zero = drawn(case)
    x = tokens_of(case)
    y = simulated(x, weight, case.launch)
    size = np.abs(np.asarray(x, float))
    x = np.asarray(x, float)
    if case.launch.scale_on == "sums":
        bound = 2.0**-20 * size @ ((np.abs(q) + np.abs(zero)) * scale)
    else:  # weights are rounded to 8 bits, zeros and scales before that
        bound = 2.0**-7 * size @ ((np.abs(q) + np.abs(zero)) * scale)
    assert (np.abs(y - x @ ((q - zero) * scale)) <= bound).all()


def test_cut_sums_are_whole_again():
    """Three programs share what two tiles of outputs need."""
    plan = stripes(8, 512, 512, 8, 256, 3, whole=False)
    assert (plan.each, plan.programs, plan.slots) == (3, 3, 2)
    np.testing.assert_array_equal(plan.pieces(), [[2], [2]])


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("size", [(1, 128, 64), (5, 4096, 14336), (700, 330, 1000)])
def test_every_unit_has_one_program_and_slots_do_not_collide(size, whole):
    plan = stripes(*size, 16, 256, 132, whole)
    unit = np.arange(plan.units)
    program, tile = unit // plan.each, unit // plan.steps
    assert program.max() + 1 == plan.programs <= 132
    slot = program - tile * plan.steps // plan.each
    assert slot.min() == 0 and slot.max() + 1 == plan.slots
    assert whole <= (plan.slots == 1)
    pairs = np.unique(np.stack([program, tile]), axis=1)
    shared = np.bincount(pairs[1])
    np.testing.assert_array_equal(shared, plan.pieces().reshape(-1))


@pytest.mark.parametrize("M", [1, 8, 16])
@pytest.mark.parametrize(("K", "N"), [(4096, 4096), (4096, 14336), (14336, 4096)])
def test_few_tokens_are_cut_along_the_inputs(M, K, N):
    """Split-K: nearly every multiprocessor works, and none has a second tile to do."""
    shape = jax.ShapeDtypeStruct
    codes = shape((N // 64, K // 128, 8, 128), jnp.uint32)
    weight = TiledWeight(codes, shape((K // 128, N), jnp.bfloat16), None, 4, 128, K)
    launch = choose(M, weight)
    plan = launch.stripes(M, weight)
    assert plan.slots > 1 and plan.programs >= 120
    assert launch.tokens == max(8, M)  # columns of the matrix unit, weights its rows


LOWERED = [
    Case(4, 128),
    Case(3, 32, "int8", M=1, N=200),
    Case(8, 64, "float32", M=64),
    Case(2, None, "int8", M=2048, K=512, N=512),
]


@pytest.mark.parametrize("case", LOWERED, ids=lambda case: case.id)
def test_the_kernel_lowers_for_cuda(case):
    """As far as JAX's own part of the compiler goes; `make kernels-check` goes on."""
    weight = jax.eval_shape(lambda: drawn(case)[0])
    x = jax.ShapeDtypeStruct((case.M, case.K), jnp.bfloat16)
    exported = jax.export.export(jax.jit(int_matmul), platforms=["cuda"])(x, weight)
    assert "mosaic_gpu" in exported.mlir_module()
    assert exported.out_avals[0].shape == (case.M, case.N)


def test_the_table_fits_every_format():
    for bits in (2, 3, 4, 8):
        for group, zero in ((32, jnp.float32), (None, None)):
            shape = jax.ShapeDtypeStruct
            per_group = (4096 // (group or 4096), 14336)
            weight = TiledWeight(
                shape((224, 32, 2 * bits, 128), jnp.uint32),
                shape(per_group, jnp.float32),
                None if zero is None else shape(per_group, zero),
                bits, group, 4096,
            )  # fmt: skip
            for M in (1, 9, 17, 33, 65, 2048):
                launch = choose(M, weight)
                assert shared_bytes(launch, weight) <= table()["shared_memory"]
                assert launch.tokens >= min(M, 256)
                used = 128 * (launch.warpgroups * launch.registers + 40)
                assert used <= 65536


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((12, 2, 4), "Launch.tokens is 12"),
        ((8, 1, 4), "Launch.warpgroups is 1"),
        ((8, 2, 1), "Launch.stages is 1"),
        ((8, 2, 4, "rows"), "Launch.scale_on is 'rows'"),
    ],
)
def test_sizes_that_no_hopper_has_are_named(sizes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Launch(*sizes)


def test_what_the_kernel_does_not_take_is_named():
    weight, *_ = drawn(CASES[0])
    with pytest.raises(ValueError, match=re.escape("x has shape (2, 100)")):
        jax.eval_shape(int_matmul, jnp.ones((2, 100)), weight)
    run = partial(jax.eval_shape, int_matmul, jnp.ones((2, 256)))
    with pytest.raises(ValueError, match="group is 96"):
        run(replace(weight, group=96))


def test_packing_is_of_what_the_reference_reads():
    case = CASES[1]
    weight, q, scale, zero = drawn(case)
    plain = IntWeight(
        jnp.asarray(q, jnp.int8), weight.scale, weight.zero, 8, case.group, case.K
    )
    x = tokens_of(case)
    expected = np.asarray(reference.int_matmul(x, plain, dtype=jnp.float32))
    y = simulated(x, weight, case.launch)
    size = np.abs(np.asarray(x, float)) @ ((np.abs(q) + np.abs(zero)) * scale)
    assert (np.abs(y - expected) <= 2.0**-20 * size).all()
