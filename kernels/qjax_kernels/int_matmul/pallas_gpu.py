"""`x @ w` with integer codes on a Hopper GPU: Mosaic GPU, weights from registers.

Outputs lie on the long side of the matrix unit (64 rows of `wgmma`), tokens on the
short one (8 to 256 columns), so that few tokens waste little. `warpgroups.py` is what a
program does; the weight has been packed once, by `fragments.tiled`.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from qjax_kernels.int_matmul.fragments import INPUTS, OUTPUTS, THREADS, TiledWeight
from qjax_kernels.int_matmul.launch import Launch, choose, sums_width, unfit
from qjax_kernels.int_matmul.warpgroups import Plan, program


def int_matmul(
    x: Any,
    weight: TiledWeight,
    *,
    dtype: Any = None,
    launch: Launch | None = None,
) -> jax.Array:
    """`x[M, K] @ w[K, N]`; see `reference.int_matmul`.

    Activations are contracted in bfloat16, sums in float32. With scales on weights,
    these and float zero points are rounded to bfloat16.

    Args:
      x: float.
      weight: the coded weight, packed.
      dtype: of the result; default that of `x`.
      launch: sizes of one program; default the table's.

    Returns:
      `[M, N]`.

    Raises:
      ValueError: the group size has no kernel, or `x` has other inputs than the weight.
    """
    if x.ndim != 2 or x.shape[1] != weight.K:
        raise ValueError(f"x has shape {x.shape}; it must be (M, {weight.K})")
    if problem := unfit(weight.group):
        raise ValueError(problem)
    dtype = jnp.dtype(x.dtype if dtype is None else dtype)
    M, N = x.shape[0], weight.N
    launch = choose(M, weight) if launch is None else launch.fitted(weight)
    plan = Plan.of(M, weight, launch, dtype)
    y = _launched(plan, operands(x, weight, plan), M, name_of(weight))
    return (added(y, plan) if plan.pieces else y)[:M, :N].astype(dtype)


def name_of(weight: TiledWeight) -> str:
    """A name for profiles: `w4a16_g128_zero`."""
    group = "channel" if weight.group is None else f"g{weight.group}"
    zero = "" if weight.zero is None else "_zero"
    return f"w{weight.bits}a16_{group}{zero}"


def operands(x: Any, weight: TiledWeight, plan: Plan) -> dict[str, jax.Array]:
    """What the program reads, by name; rows are as long as copies need."""
    x = jnp.pad(x.astype(jnp.bfloat16), ((0, 0), (0, -weight.K % INPUTS)))
    wide = ((0, 0), (0, -weight.N % OUTPUTS))
    found = {"codes": weight.codes, "scale": jnp.pad(weight.scale, wide), "x": x}
    if weight.zero is not None:
        found["zero"] = jnp.pad(weight.zero, wide)
        if plan.on_sums:
            found["x_sums"] = group_sums(x, plan)
    return found


def group_sums(x: Any, plan: Plan) -> jax.Array:
    """Sums of `x` over the groups of every tile, `[groups, tokens]` in float32."""
    tokens, blocks = plan.launch.tokens, plan.stripes.token_blocks
    inputs = plan.stripes.steps * INPUTS
    short = ((0, blocks * tokens - x.shape[0]), (0, inputs - x.shape[1]))
    parts = jnp.pad(x, short).reshape(blocks, tokens, -1, plan.group)
    sums = jnp.moveaxis(parts.astype(jnp.float32).sum(-1), -1, 0)
    room = ((0, 0), (0, 0), (0, sums_width(tokens) - tokens))
    return jnp.pad(sums, room).reshape(sums.shape[0], -1)


def _launched(plan: Plan, given: dict[str, jax.Array], M: int, name: str) -> jax.Array:
    """Run the programs."""
    N = given["scale"].shape[1]
    padded = plan.stripes.token_blocks * plan.launch.tokens
    if plan.pieces:
        out = jax.ShapeDtypeStruct((plan.stripes.slots, N, padded), jnp.float32)
    else:
        out = jax.ShapeDtypeStruct((M, N), plan.dtype)
    return plgpu.kernel(
        partial(program, plan=plan, names=tuple(given)),
        out_type=out,
        grid=(plan.stripes.programs,),
        grid_names=("program",),
        num_threads=plan.launch.warpgroups + 1,
        thread_name="warpgroup",
        kernel_name=name,
        scratch_types=_scratch(plan, given),
        compiler_params=plgpu.CompilerParams(
            unsafe_no_auto_barriers=True,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
    )(*given.values())


def _scratch(plan: Plan, given: dict[str, jax.Array]) -> dict[str, Any]:
    """Shared memory of a program: a ring of stages, and results on their way out."""
    launch, rows = plan.launch, plan.rows
    by_output = (launch.stages, rows, launch.outputs)
    shapes = {
        "codes": (launch.stages, launch.warpgroups, given["codes"].shape[2], THREADS),
        "scale": by_output,
        "zero": by_output,
        "x": (launch.stages, launch.tokens, INPUTS),
        "x_sums": (launch.stages, rows, sums_width(launch.tokens)),
    }
    columns = {"x": min(plan.group, 64)}
    ring = {
        name: plgpu.SMEM(shapes[name], value.dtype, transforms=_tiles(name, columns))
        for name, value in given.items()
    }
    if plan.pieces:
        out = plgpu.SMEM((launch.warpgroups, OUTPUTS, launch.copied), jnp.float32)
    else:
        shape = (launch.warpgroups, launch.copied, OUTPUTS)
        out = plgpu.SMEM(shape, plan.dtype, transforms=_tiles("out", {"out": OUTPUTS}))
    return {
        "ring": ring,
        "out": out,
        "full": plgpu.Barrier(num_arrivals=len(given), num_barriers=launch.stages),
        "empty": plgpu.Barrier(
            num_arrivals=launch.warpgroups, num_barriers=launch.stages
        ),
    }


def _tiles(name: str, columns: dict[str, int]) -> tuple[Any, ...]:
    """How rows of 16-bit values lie for the matrix unit and for transposition."""
    if name not in columns:
        return ()
    return (
        plgpu.TilingTransform((8, columns[name])),
        plgpu.SwizzleTransform(2 * columns[name]),
    )


def added(pieces: jax.Array, plan: Plan) -> jax.Array:
    """Sums `[tokens, outputs]` of pieces `[slots, outputs, tokens]`.

    Slots that no program wrote hold anything, NaN included.
    """
    count = plan.stripes.pieces()
    written = jnp.arange(plan.stripes.slots)[:, None, None] < jnp.asarray(count)
    written = jnp.repeat(written, plan.launch.outputs, 1)[:, : pieces.shape[1]]
    written = jnp.repeat(written, plan.launch.tokens, 2)
    return jnp.where(written, pieces, 0).sum(0).T
