"""Decode attention over a cache in low bits, on a TPU.

The grid is (sequences, blocks of slots); a block that a sequence does not see is
neither read nor computed. All heads meet all keys of a block in one product: the matrix
unit takes in the keys once either way, and scores of other heads are masked. Scales of
slots multiply scores and weights, so codes are converted and nothing else.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qjax_kernels.compat import chip
from qjax_kernels.kv_attention.cached import Cached, check
from qjax_kernels.scaled.table import sizes

LANES, MIB = 128, 2**20
SIZES = sizes("kv_attention")
# Rows (slots times heads) of a step, and those that softmax meets at a time.
ROWS, TILE = SIZES["rows"], SIZES["tile"]
LEAST_LIMIT = 16 * MIB
ROOM = 4 * MIB


def kv_attention(
    q: Any,
    keys: Cached,
    values: Cached,
    start: Any,
    stop: Any,
    *,
    scale: float,
    generation: str,
    dtype: Any = None,
    slots: int | None = None,
    tile: int = TILE,
    interpret: Any = False,
) -> jax.Array:
    """Softmax attention of one new token of every sequence.

    See `reference.kv_attention`. Queries, keys, and softmax's weights times the scales
    of values are contracted in bfloat16, accumulated in float32.

    Args:
      q: float `[B, H, d]`.
      keys: of `[B, S, G, d]`.
      values: likewise, scales for each slot and head.
      start: int32 `[B]`, the first slot that a sequence sees.
      stop: int32 `[B]`, the slot after the last.
      scale: of the scores.
      generation: of the TPU: "v5e", "v5p", "v6e" or "v7x".
      dtype: of the result; default that of `q`.
      slots: of one grid step; default `choose`'s.
      tile: rows (slots times heads) that softmax meets at a time, whole runs.
      interpret: as for `pl.pallas_call`.

    Returns:
      `[B, H, d]`.

    Raises:
      ValueError: shapes or dtypes do not agree, or a step needs more VMEM than the
        generation has.
    """
    check(q, keys, values, start, stop)
    B, S, G, d = keys.codes.shape
    H = q.shape[1]
    slots = choose(keys) if slots is None else slots
    problem = too_large(generation, q, keys, slots)
    if problem:
        raise ValueError(problem)
    tile = fitted(tile, keys, slots)
    plan = Plan(H, G, S, slots, tile, keys.tokens, scale)
    operands, specs = [q.astype(jnp.bfloat16)], [pl.BlockSpec((None, H, d), _whole)]
    for cached in (keys, values):
        more, how = _cached_operands(cached, plan)
        operands, specs = operands + more, specs + how
    own, slot = _columns(plan)
    operands += [own, slot]
    specs += [
        pl.BlockSpec((H, plan.rows), lambda b, j, *_: (0, 0)),
        pl.BlockSpec((1, plan.rows), lambda b, j, *_: (0, 0)),
    ]
    present = (keys.zero is not None, values.zero is not None)
    return pl.pallas_call(
        partial(_kernel, plan=plan, zeros=present),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(B, pl.cdiv(S, slots)),
            in_specs=specs,
            out_specs=pl.BlockSpec((None, H, d), _whole),
            scratch_shapes=[
                pltpu.VMEM((H, 1), jnp.float32),
                pltpu.VMEM((H, 1), jnp.float32),
                pltpu.VMEM((H, d), jnp.float32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype if dtype is None else dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=max(
                LEAST_LIMIT, vmem_bytes(q, keys, slots) // MIB * MIB + ROOM
            ),
        ),
        interpret=interpret,
        name=name_of(keys, values),
    )(start, stop, *operands)


def name_of(keys: Cached, values: Cached) -> str:
    """A name for profiles: `attention_int8_int8`."""
    runs = "" if keys.tokens is None else f"_g{keys.tokens}"
    zero = "" if keys.zero is None else "_zero"
    return f"attention_{keys.codes.dtype.name}{runs}{zero}_{values.codes.dtype.name}"


def choose(keys: Cached) -> int:
    """Slots of one step: about `ROWS` rows, whole runs and whole registers."""
    _, S, G, _ = keys.codes.shape
    unit = max(LANES, keys.tokens or 1)
    return min(S, max(unit, ROWS // G // unit * unit))


def fitted(tile: int, keys: Cached, slots: int) -> int:
    """A tile of whole registers and whole runs; all rows of a step if it has none."""
    G = keys.codes.shape[2]
    unit = math.lcm(LANES, G * (keys.tokens or 1))
    return max(tile // unit * unit, unit) if slots * G % unit == 0 else slots * G


def vmem_bytes(q: Any, keys: Cached, slots: int) -> int:
    """VMEM of one step: double-buffered blocks, decoded codes, scores."""
    _, H, d = q.shape
    G = keys.codes.shape[2]
    rows = -(-slots * G // LANES) * LANES
    d, H = -(-d // LANES) * LANES, -(-H // 8) * 8
    codes = 2 * rows * d * (1 if keys.codes.dtype != jnp.int4 else 0.5)
    scales = rows * 4 * 2 * 8
    if keys.tokens is not None:
        scales += 2 * (slots // keys.tokens) * max(G, 8) * d * 4
    decoded = 2 * rows * d * 4
    scores = 5 * H * rows * 4
    return int(2 * (codes + scales) + decoded + scores)


def too_large(generation: str, q: Any, keys: Cached, slots: int) -> str:
    """That a step needs more VMEM than there is; empty if it does not."""
    capacity = chip(generation).vmem_capacity_bytes
    needed = vmem_bytes(q, keys, slots) + ROOM
    if needed <= capacity:
        return ""
    return (
        f"{slots} slots in a step need about {needed / MIB:.0f} MiB of VMEM; "
        f"{generation} has {capacity / MIB:.0f} MiB"
    )


def left_to_xla(generation: str, keys: Cached) -> str:
    """Why XLA attends at least as fast, by its own estimate; empty if it does not.

    As `bench/beside.py` counts them. e4m3 is converted by many instructions before v7x,
    and there instructions bound the kernel.
    """
    both = ("int8", "int4")
    faster = {"v5e": both, "v5p": both, "v6e": both, "v7x": ("int8",)}
    name = keys.codes.dtype.name
    if name in faster.get(generation, ()):
        return ""
    return f"with {name} the kernel is not known to be faster than XLA on {generation}"


@dataclass(frozen=True)
class Plan:
    """Everything static that the kernel's body needs."""

    H: int
    G: int
    S: int
    slots: int
    tile: int
    tokens: int | None
    scale: float

    @property
    def rows(self) -> int:
        """Keys in a step, of all heads."""
        return self.slots * self.G


def _whole(b: Any, j: Any, *_: Any) -> Any:
    return b, 0, 0


def _seen(b: Any, j: Any, start: Any, stop: Any, slots: int) -> Any:
    """The block that is read in place of `j`: the nearest one that is seen."""
    last = lax.div(jnp.maximum(stop[b] - 1, 0), slots)
    return jnp.clip(j, jnp.minimum(lax.div(start[b], slots), last), last)


def _cached_operands(cached: Cached, plan: Plan) -> tuple[list[Any], list[Any]]:
    """Codes as rows of all heads, scales as one row, or as they are for runs."""
    B, S, G, d = cached.codes.shape

    def rows(b: Any, j: Any, start: Any, stop: Any) -> Any:
        return b, _seen(b, j, start, stop, plan.slots), 0

    def columns(b: Any, j: Any, start: Any, stop: Any) -> Any:
        return b, 0, _seen(b, j, start, stop, plan.slots)

    def runs(b: Any, j: Any, start: Any, stop: Any) -> Any:
        return b, _seen(b, j, start, stop, plan.slots), 0, 0

    operands = [cached.codes.reshape(B, S * G, d)]
    specs = [pl.BlockSpec((None, plan.rows, d), rows)]
    for value in (cached.scale, cached.zero):
        if value is None:
            continue
        operands.append(value)
        if cached.tokens is None:
            specs.append(pl.BlockSpec((None, 1, plan.rows), columns))
        else:
            count = plan.slots // cached.tokens
            specs.append(pl.BlockSpec((None, count, G, d), runs))
    return operands, specs


def _columns(plan: Plan) -> tuple[Any, Any]:
    """Of every column of scores: 0 for its own heads, else -inf, and its slot."""
    column = np.arange(plan.rows)
    head = np.arange(plan.H)[:, None] // (plan.H // plan.G)
    own = np.where(column % plan.G == head, 0, -np.inf).astype(np.float32)
    return jnp.asarray(own), jnp.asarray(column // plan.G, jnp.int32)[None]


def _kernel(start: Any, stop: Any, *refs: Any, plan: Plan, zeros: Any) -> None:
    """One block of slots of one sequence: a step of the online softmax."""
    left = list(refs)
    q, keys = left.pop(0), _take(left, zeros[0])
    values = _take(left, zeros[1])
    own, slot, out, top, total, sums = left
    b, j = pl.program_id(0), pl.program_id(1)
    first, after = start[b], jnp.minimum(stop[b], plan.S)

    @pl.when(j == 0)
    def _begin():
        top[...] = jnp.full_like(top, -jnp.inf)
        total[...] = jnp.zeros_like(total)
        sums[...] = jnp.zeros_like(sums)

    @pl.when((j * plan.slots < after) & ((j + 1) * plan.slots > first))
    def _step():
        state = top[...], total[...], sums[...]
        for row in range(0, plan.rows, plan.tile):
            part = pl.ds(row, min(plan.tile, plan.rows - row))
            at = slot[:, part] + j * plan.slots
            seen = (at >= first) & (at < after)
            scores = _scores(q[...], keys, part, seen, plan) + own[:, part]
            rows = [(at - j * plan.slots) * plan.G - row for at in (first, after)]
            state = _online(state, scores, partial(_mean, values, part, seen, rows))
        top[...], total[...], sums[...] = state

    @pl.when(j == pl.num_programs(1) - 1)
    def _end():
        weight = total[...]
        mean = sums[...] / jnp.where(weight == 0, 1, weight)
        out[...] = mean.astype(out.dtype)


def _take(left: list[Any], zero: bool) -> tuple[Any, Any, Any]:
    """References of codes, scales and zeros."""
    return left.pop(0), left.pop(0), left.pop(0) if zero else None


def _online(state: Any, scores: Any, mean: Any) -> Any:
    """Highest score, sum of weights and weighted sum of values, some keys later."""
    top, total, sums = state
    highest = jnp.maximum(top, jnp.max(scores, axis=1, keepdims=True))
    # Where nothing is seen yet, -inf less -inf would be NaN.
    base = jnp.where(highest == -jnp.inf, 0, highest)
    weights, shrink = jnp.exp(scores - base), jnp.exp(top - base)
    total = total * shrink + jnp.sum(weights, axis=1, keepdims=True)
    return highest, total, sums * shrink + mean(weights)


def _scores(q: Any, keys: tuple[Any, Any, Any], part: Any, seen: Any, plan: Plan):
    """Every head of `q[H, d]` with every key of some rows, `[H, rows]`.

    Of what is not seen, -inf: scales may be NaN there, and codes if they are floats.
    """
    codes, scale, zero = keys
    if plan.tokens is not None:
        return jnp.where(seen, _run_scores(q, keys, part, plan) * plan.scale, -jnp.inf)
    y = _dot(q, codes[part, :].astype(jnp.bfloat16), 1)
    # Rows of one sublane: far cheaper than the same on all scores.
    if zero is not None:
        sums = jnp.sum(q.astype(jnp.float32), axis=1, keepdims=True)
        y = y - sums * jnp.where(seen, zero[:, part], 0)
    y = y * jnp.where(seen, scale[:, part] * plan.scale, 0)
    if jnp.issubdtype(codes.dtype, jnp.floating):
        return jnp.where(seen, y, -jnp.inf)
    return y + jnp.where(seen, 0, -jnp.inf)


def _run_scores(q: Any, keys: tuple[Any, Any, Any], part: Any, plan: Plan) -> Any:
    """Scores of keys whose features have scales for runs of slots."""
    codes, scale, zero = keys
    assert plan.tokens is not None
    length, pieces = plan.tokens * plan.G, []
    for row in range(part.start, part.start + part.size, length):
        run = row // length
        wide = q.astype(jnp.float32) * _to_heads(scale[run], plan)
        # Zeros meet what is left of `q` after rounding, as the codes do.
        narrow = wide.astype(jnp.bfloat16)
        y = _dot(narrow, codes[row : row + length, :].astype(jnp.bfloat16), 1)
        if zero is not None:
            moved = narrow.astype(jnp.float32) * _to_heads(zero[run], plan)
            y = y - jnp.sum(moved, axis=1, keepdims=True)
        pieces.append(y)
    return jnp.concatenate(pieces, axis=1)


def _to_heads(values: Any, plan: Plan) -> Any:
    """Rows of `[G, d]` for every head that shares them, `[H, d]`."""
    return jnp.repeat(values, plan.H // plan.G, axis=0)


def _mean(values: Any, part: Any, seen: Any, rows: list[Any], weights: Any) -> Any:
    """The values of a part, weighted, `[H, d]`; those seen are between `rows`."""
    codes, scale, zero = values
    weights = weights * jnp.where(seen, scale[:, part], 0)
    v = codes[part, :].astype(jnp.bfloat16)
    if jnp.issubdtype(codes.dtype, jnp.floating):
        # What was never written may be NaN, and 0 times it is one too.
        row = lax.broadcasted_iota(jnp.int32, v.shape, 0)
        v = jnp.where((row >= rows[0]) & (row < rows[1]), v, 0)
    y = _dot(weights.astype(jnp.bfloat16), v, 0)
    if zero is None:
        return y
    moved = weights * jnp.where(seen, zero[:, part], 0)
    return y - jnp.sum(moved, axis=1, keepdims=True)


def _dot(x: Any, y: Any, axis: int) -> Any:
    return lax.dot_general(
        x, y, (((1,), (axis,)), ((), ())), preferred_element_type=jnp.float32
    )
