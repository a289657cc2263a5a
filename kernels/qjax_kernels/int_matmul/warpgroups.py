"""What one program does on a Hopper GPU.

The last warpgroup brings codes, scales and tokens of one unit after the other into a
ring of stages in shared memory. The others turn their 64 outputs' codes into bfloat16
in registers, multiply, and put scales on the sums of each group, or on the weights.
"""

from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from qjax_kernels.compat import load
from qjax_kernels.int_matmul.fragments import INPUTS, OUTPUTS, TiledWeight
from qjax_kernels.int_matmul.launch import PRODUCER, Launch, sums_width
from qjax_kernels.int_matmul.registers import decode, words_layout
from qjax_kernels.int_matmul.stripes import Stripes

BY_OUTPUT = plgpu.Layout.WGMMA.reduce(1)
BY_TOKEN = plgpu.Layout.WGMMA.reduce(0)


@dataclass(frozen=True)
class Plan:
    """Everything static that a program needs.

    Attributes:
      launch: sizes.
      stripes: who computes what.
      bits: of a code.
      group: inputs of a tile that share a scale.
      tiles_per_scale: tiles along the inputs that share a row of scales.
      dtype: of the result.
    """

    launch: Launch
    stripes: Stripes
    bits: int
    group: int
    tiles_per_scale: int
    dtype: Any

    @classmethod
    def of(cls, M: int, weight: TiledWeight, launch: Launch, dtype: Any) -> "Plan":
        """The plan for a weight."""
        cut = launch.stripes(M, weight)
        per_scale = cut.steps if weight.group is None else weight.group // INPUTS
        group = min(weight.group or INPUTS, INPUTS)
        return cls(launch, cut, weight.bits, group, max(per_scale, 1), dtype)

    @property
    def rows(self) -> int:
        """Rows of scales that a tile needs."""
        return INPUTS // self.group

    @property
    def on_sums(self) -> bool:
        """Whether scales go on the sums."""
        return self.launch.scale_on == "sums"

    @property
    def pieces(self) -> bool:
        """Whether some sum is cut."""
        return self.stripes.slots > 1

    def unit(self, number: Any) -> tuple[Any, Any, Any]:
        """Step along the inputs, block of tokens and tile of outputs of a unit."""
        tile = lax.div(number, self.stripes.steps)
        blocks = self.stripes.token_blocks
        step = lax.rem(number, self.stripes.steps)
        return step, lax.rem(tile, blocks), lax.div(tile, blocks)

    def sources(self, number: Any) -> dict[str, tuple[Any, ...]]:
        """Where in each operand the data of a unit lie."""
        step, block, tile = self.unit(number)
        launch, rows = self.launch, self.rows
        row = lax.div(step * rows, self.tiles_per_scale)
        per_output = pl.ds(row, rows), pl.ds(tile * launch.outputs, launch.outputs)
        width = sums_width(launch.tokens)
        return {
            "codes": (pl.ds(tile * launch.warpgroups, launch.warpgroups), step),
            "scale": per_output,
            "zero": per_output,
            "x": (
                pl.ds(block * launch.tokens, launch.tokens),
                pl.ds(step * INPUTS, INPUTS),
            ),
            "x_sums": (pl.ds(step * rows, rows), pl.ds(block * width, width)),
        }


@dataclass(frozen=True)
class Memory:
    """Operands in memory, their ring of stages, results, and this program's units."""

    given: dict[str, Any]
    result: Any
    ring: dict[str, Any]
    out: Any
    full: Any
    empty: Any
    first: Any
    last: Any

    def stage(self, number: Any, plan: Plan) -> Any:
        """Where in the ring a unit lies."""
        return lax.rem(number - self.first, plan.launch.stages)


def program(*refs: Any, plan: Plan, names: tuple[str, ...], **scratch: Any) -> None:
    """The body of the kernel."""
    first = lax.axis_index("program") * plan.stripes.each
    last = jnp.minimum(first + plan.stripes.each, plan.stripes.units)
    given = dict(zip(names, refs))
    memory = Memory(given, refs[-1], first=first, last=last, **scratch)
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == plan.launch.warpgroups)
    def _bring():
        plgpu.set_max_registers(PRODUCER, action="decrease")
        lax.fori_loop(first, last, lambda i, _: bring(memory, i, plan), None)

    @pl.when(warpgroup < plan.launch.warpgroups)
    def _multiply():
        plgpu.set_max_registers(plan.launch.registers, action="increase")
        steps = plan.stripes.steps
        lax.fori_loop(
            lax.div(first, steps),
            lax.div(last - 1, steps) + 1,
            lambda i, _: finish(memory, i, warpgroup, plan),
            None,
        )


def bring(memory: Memory, number: Any, plan: Plan) -> None:
    """Copy a unit's data into its stage, once the unit before has left it."""
    stage = memory.stage(number, plan)

    @pl.when(number - memory.first >= plan.launch.stages)
    def _wait():
        plgpu.barrier_wait(memory.empty.at[stage])

    where = plan.sources(number)
    for name, ref in memory.given.items():
        plgpu.copy_gmem_to_smem(
            ref.at[where[name]], memory.ring[name].at[stage], memory.full.at[stage]
        )


def finish(memory: Memory, tile: Any, warpgroup: Any, plan: Plan) -> None:
    """This program's part of one sum, written out."""
    steps = plan.stripes.steps
    start = jnp.maximum(memory.first, tile * steps)
    stop = jnp.minimum(memory.last, (tile + 1) * steps)
    shape = OUTPUTS, plan.launch.tokens
    if plan.on_sums:
        zeros = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)
        total = lax.fori_loop(
            start,
            stop,
            lambda i, y: y + unit_sum(memory, i, warpgroup, plan, shape),
            zeros,
        )
    else:

        def accumulate(sums: Any) -> jax.Array:
            def step(i: Any, _: None) -> None:
                add_unit(memory, i, warpgroup, plan, sums)

            lax.fori_loop(start, stop, step, None)
            return sums[...]

        total = pl.run_scoped(accumulate, plgpu.WGMMAAccumulatorRef(shape))
    write(memory, tile, warpgroup, total, plan)


def unit_sum(
    memory: Memory, number: Any, warpgroup: Any, plan: Plan, shape: tuple[int, int]
) -> jax.Array:
    """A unit's share of the sum, scales and zero points on the sums of its groups."""
    stage = memory.stage(number, plan)
    plgpu.barrier_wait(memory.full.at[stage])
    words = _words(memory, stage, warpgroup, plan)
    parts = []
    for row in range(plan.rows):
        q = decode(words, plan.bits, row * plan.group, plan.group)

        def product(sums: Any, q: Any = q, row: int = row) -> jax.Array:
            plgpu.wgmma(sums, q, _tokens(memory, stage, row, plan))
            return sums[...]

        y = pl.run_scoped(product, plgpu.WGMMAAccumulatorRef(shape))
        if "zero" in memory.ring:
            x_sums = memory.ring["x_sums"].at[stage, row, pl.ds(0, shape[1])]
            wide = lax.broadcast_in_dim(load(x_sums, BY_TOKEN), shape, [1])
            y = y - wide * _wide(memory, "zero", stage, row, warpgroup, shape)
        y = y * _wide(memory, "scale", stage, row, warpgroup, shape)
        parts.append(y)
    plgpu.barrier_arrive(memory.empty.at[stage])
    return reduce(add, parts)


def add_unit(
    memory: Memory, number: Any, warpgroup: Any, plan: Plan, sums: Any
) -> None:
    """Add a unit's share to the sum, scales and zero points on its weights."""
    stage = memory.stage(number, plan)
    plgpu.barrier_wait(memory.full.at[stage])
    words = _words(memory, stage, warpgroup, plan)
    for row in range(plan.rows):
        w = decode(words, plan.bits, row * plan.group, plan.group)
        for name in ("zero", "scale"):
            if name in memory.ring:
                wide = _wide(memory, name, stage, row, warpgroup, w.shape, w.dtype)
                w = w - wide if name == "zero" else w * wide
        plgpu.wgmma(sums, w, _tokens(memory, stage, row, plan))
        plgpu.wgmma_wait(0)
    plgpu.barrier_arrive(memory.empty.at[stage])


def write(memory: Memory, tile: Any, warpgroup: Any, total: Any, plan: Plan) -> None:
    """Results, or this program's piece of them, a few tokens at a time."""
    launch = plan.launch
    block = lax.rem(tile, plan.stripes.token_blocks)
    output = lax.div(tile, plan.stripes.token_blocks) * launch.outputs
    outputs = pl.ds(output + warpgroup * OUTPUTS, OUTPUTS)
    out = memory.out.at[warpgroup]
    for start in range(0, launch.tokens, launch.copied):
        y = total[:, start : start + launch.copied]
        tokens = pl.ds(block * launch.tokens + start, launch.copied)
        if plan.pieces:
            out[...] = y
            owner = lax.div(tile * plan.stripes.steps, plan.stripes.each)
            target = memory.result.at[
                lax.axis_index("program") - owner, outputs, tokens
            ]
        else:
            turned = plgpu.Layout.WGMMA_TRANSPOSED
            out.transpose((1, 0))[...] = plgpu.layout_cast(y.astype(plan.dtype), turned)
            target = memory.result.at[tokens, outputs]
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out, target)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _words(memory: Memory, stage: Any, warpgroup: Any, plan: Plan) -> jax.Array:
    """The codes of this warpgroup's outputs."""
    return load(memory.ring["codes"].at[stage, warpgroup], words_layout(plan.bits))


def _tokens(memory: Memory, stage: Any, row: int, plan: Plan) -> Any:
    """The tokens' inputs of one group, `[group, tokens]`."""
    columns = pl.ds(row * plan.group, plan.group)
    return memory.ring["x"].at[stage, :, columns].transpose((1, 0))


def _wide(
    memory: Memory,
    name: str,
    stage: Any,
    row: int,
    warpgroup: Any,
    shape: tuple[int, ...],
    dtype: Any = jnp.float32,
) -> jax.Array:
    """A row of scales or zeros, one for each of this warpgroup's outputs."""
    outputs = pl.ds(warpgroup * OUTPUTS, OUTPUTS)
    values = load(memory.ring[name].at[stage, row, outputs], BY_OUTPUT)
    return lax.broadcast_in_dim(values.astype(dtype), shape, [0])
