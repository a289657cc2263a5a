"""A site's input as `x[M, K]`, with a weight for each token; and its statistics."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from qjax.core.statistics import Statistic
from qjax.placement import NOWHERE, Placement
from qjax.trace.segments import structure_of
from qjax.trace.tape import Meeting

Statistics = Mapping[str, Statistic]


def leading(op: Meeting) -> tuple[int, ...]:
    """Sizes of the batched axes (experts) of the weight, in leaf order."""
    shape = op.weight.view.leaf_shape
    return tuple(s for s, r in zip(shape, op.call.layout.roles) if r == "b")


def refusal(op: Meeting) -> str:
    """Why statistics of the site's input cannot be taken; empty if they can."""
    if op.call.kind == "embedding":
        return "a lookup has no input to calibrate"
    if op.call.kind == "conv" and op.eqn.params["feature_group_count"] != 1:
        return "a grouped convolution has an input for each group"
    return ""


def rows(
    op: Meeting, x: Any, rest: Sequence[Any], mask: Any
) -> tuple[jax.Array, jax.Array]:
    """The input as `x[*lead, M, K]` and the tokens' weights `[*lead, M]`.

    Where all experts read the same rows, and only the weights tell whose they are, `x`
    is `[M, K]`.

    Args:
      op: the site.
      x: its activation, as the equation reads it, or several stacked along a new axis.
      rest: all operands of the equation, stacked alike.
      mask: token weights with as many elements as there are tokens, or None.
    """
    if not is_stacked(op, x):
        return _rows(op, x, rest, mask)
    several = jax.vmap(lambda x, rest: _rows(op, x, rest, None))
    x, weight = several(x, [None if r is None else r for r in rest])
    x, weight = jnp.moveaxis(x, 0, -3), jnp.moveaxis(weight, 0, -2)
    *lead, V, M, K = x.shape
    return x.reshape(*lead, V * M, K), weight.reshape(*weight.shape[:-2], V * M)


def _rows(
    op: Meeting, x: Any, rest: Sequence[Any], mask: Any
) -> tuple[jax.Array, jax.Array]:
    if op.call.kind == "ragged_dot":
        return x, _ragged_weights(x, rest[2], mask)
    x = _patches(op, x) if op.call.kind == "conv" else op.call.matrix(x)
    return x, jnp.broadcast_to(_weights(x.shape[-2], mask), x.shape[:-1])


def is_stacked(op: Meeting, x: Any) -> bool:
    """Whether `x` holds the activations of several visits."""
    return x.ndim > len(op.eqn.invars[op.call.operand].aval.shape)


def mask_fits(op: Meeting, x: Any, mask: Any) -> bool:
    """Whether the mask has one weight for each token that the site sees.

    The site may see the tokens of all sequences in one axis, or in the mask's own axes;
    not in other axes, such as time before batch.
    """
    if op.call.kind != "dot" or is_stacked(op, x) or mask.size != op.call.M:
        return False
    contract, batch = op.eqn.params["dimension_numbers"]
    gone = (*contract[op.call.operand], *batch[op.call.operand])
    shape = op.eqn.invars[op.call.operand].aval.shape
    tokens = [n for d, n in enumerate(shape) if d not in gone and n != 1]
    return len(tokens) <= 1 or tokens == [n for n in mask.shape if n != 1]


def _weights(M: int, mask: Any) -> jax.Array:
    if mask is None:
        return jnp.ones((M,), jnp.float32)
    return mask.reshape(M).astype(jnp.float32)


def _ragged_weights(x: Any, sizes: Any, mask: Any) -> jax.Array:
    """Every expert sees all rows, with weight 0 for those of other experts."""
    ends = jnp.cumsum(sizes)
    place = jnp.arange(x.shape[0], dtype=ends.dtype)
    mine = (place >= (ends - sizes)[:, None]) & (place < ends[:, None])
    return mine.astype(jnp.float32) * _weights(x.shape[0], mask)


def _patches(op: Meeting, image: Any) -> jax.Array:
    """What the kernel sees at each place, `[M, K]` with K in the kernel's own order."""
    p = op.eqn.params
    numbers = p["dimension_numbers"]
    kernel = op.eqn.invars[1].aval.shape
    window = [kernel[d] for d in numbers.rhs_spec[2:]]
    spatial = len(window)
    forward = (numbers.lhs_spec[0], numbers.lhs_spec[1], *numbers.lhs_spec[2:])
    plain = jax.lax.ConvDimensionNumbers(
        tuple(range(spatial + 2)), tuple(range(spatial + 2)), tuple(range(spatial + 2))
    )
    found = jax.lax.conv_general_dilated_patches(
        jnp.transpose(image, forward).astype(jnp.float32),
        window,
        p["window_strides"],
        p["padding"],
        p["lhs_dilation"],
        p["rhs_dilation"],
        dimension_numbers=plain,
        precision=jax.lax.Precision.HIGHEST,
    )
    # [B, I * window, *places] -> [B, *places, I, *window] -> the kernel's axes.
    channels = kernel[numbers.rhs_spec[1]]
    places = found.shape[2:]
    split = found.reshape(found.shape[0], channels, *window, *places)
    ahead = (0, *range(2 + spatial, 2 + 2 * spatial))
    own = (numbers.rhs_spec[1], *numbers.rhs_spec[2:])
    behind = [1 + own.index(d) for d in sorted(own)]
    moved = jnp.transpose(split, (*ahead, *behind))
    M = found.shape[0] * prod(places)
    kernel_sizes = [kernel[d] for d in sorted(own)]
    by_view = moved.reshape(M, *kernel_sizes)
    return _leaf_order(op, by_view, sorted(own)).reshape(M, -1)


def _leaf_order(op: Meeting, x: Any, dims: Sequence[int]) -> Any:
    """`x[M, *kernel axes]` with the axes in the order of the leaf's own."""
    atoms = [op.weight.view.axes[d] for d in dims]
    sizes = [op.weight.view.atoms[a] for axis in atoms for a in axis]
    flat = [a for axis in atoms for a in axis]
    order = sorted(range(len(flat)), key=flat.__getitem__)
    return jnp.transpose(x.reshape(-1, *sizes), (0, *(1 + i for i in order)))


@dataclass(frozen=True)
class Seen:
    """What was accumulated at a point.

    `states` by name, with the experts' axes in front; `tokens` and `bad` (values that
    are not finite) for each expert.
    """

    states: Any
    tokens: Any
    bad: Any


jax.tree_util.register_dataclass(Seen, ["states", "tokens", "bad"], [])


def nothing(statistics: Statistics, op: Meeting) -> Seen:
    """Before the first batch."""
    lead, K = leading(op), op.call.layout.K

    def wide(x: Any) -> Any:
        return jnp.broadcast_to(x, (*lead, *x.shape))

    states = {n: jax.tree.map(wide, each.init(K)) for n, each in statistics.items()}
    return Seen(states, jnp.zeros(lead), jnp.zeros(lead))


@dataclass
class Accumulator:
    """Updates, compiled once for sites of equal structure.

    On a mesh every device takes the statistics of its own tokens, and they are merged
    in the order of the devices: the result is that of one device which is given the
    same batches one after the other.
    """

    placement: Placement = NOWHERE
    used: set[Any] = field(default_factory=set)

    def init(self, statistics: Statistics, op: Meeting) -> Seen:
        """Nothing seen."""
        # Copies: the states are donated, and two of them may be one array.
        return jax.tree.map(partial(jnp.array, copy=True), nothing(statistics, op))

    def update(
        self,
        statistics: Statistics,
        op: Meeting,
        seen: Seen,
        x: Any,
        full: Any,
        rest: Sequence[Any],
        mask: Any,
        move: Any = None,
    ) -> Seen:
        """With one more batch; `move` is a transform of the input, before it counts."""
        others = tuple(r if i == 2 else None for i, r in enumerate(rest))
        reading = Reading(
            tuple(statistics.items()),
            structure_of(op.eqn),
            op.weight.view,
            op.call.operand,
            tuple(tuple(v.aval.shape) for v in op.eqn.invars),
            self.placement,
            op,
        )
        self.used.add(reading)
        return _run_update(reading, seen, x, full, others, mask, move)


@dataclass(frozen=True)
class Reading:
    """How a site reads its input, and what is taken of it, as a static argument."""

    statistics: tuple[tuple[str, Statistic], ...]
    structure: Any
    view: Any
    operand: int
    shapes: Any
    placement: Placement
    op: Meeting = field(compare=False, repr=False)


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def _run_update(
    reading: Reading, seen: Seen, x: Any, full: Any, rest: Any, mask: Any, move: Any
) -> Seen:
    op = reading.op
    x, weight = rows(op, x, rest, mask)
    full = None if full is None else rows(op, full, rest, mask)[0]
    if move is not None:
        x = move(x)
        full = None if full is None else move(full)
    statistics = dict(reading.statistics)
    devices = reading.placement.tokens(x.shape[-2])
    if devices == 1:
        return _taken(statistics, seen, x, full, weight)
    parts = _taken_apart(reading, x, full, weight)
    for device in range(devices):
        part = jax.tree.map(lambda a, d=device: a[d], parts)
        seen = merged(statistics, seen, part)
    return seen


def _taken_apart(reading: Reading, x: Any, full: Any, weight: Any) -> Seen:
    """What each device sees of its own tokens, with the devices in front."""
    statistics, op = dict(reading.statistics), reading.op

    def local(x: Any, full: Any, weight: Any) -> Seen:
        seen = _taken(statistics, nothing(statistics, op), x, full, weight)
        return jax.tree.map(lambda a: a[None], seen)

    def spec(a: Any, token_axis: int) -> PartitionSpec:
        return PartitionSpec(*(None,) * (a.ndim + token_axis), "data")

    rows_spec = spec(x, -2)
    return jax.shard_map(
        local,
        mesh=reading.placement.mesh,
        in_specs=(rows_spec, rows_spec, spec(weight, -1)),
        out_specs=PartitionSpec("data"),
        check_vma=False,
    )(x, full, weight)


def _taken(statistics: Statistics, seen: Seen, x: Any, full: Any, weight: Any) -> Seen:
    """With the rows `x[*lead, M, K]`, or `x[M, K]` for all experts."""
    unfit = jnp.sum(~jnp.isfinite(x), axis=-1)
    bad = seen.bad + jnp.sum(jnp.where(weight > 0, unfit, 0), axis=-1)

    def one(states: Any, weight: Any, x: Any, full: Any) -> Any:
        # Padding may hold anything; 0 times NaN is NaN.
        x, full = (
            None if a is None else jnp.where(weight[:, None] > 0, a, jnp.zeros_like(a))
            for a in (x, full)
        )
        return {
            name: each.update(states[name], x, weight, full)
            for name, each in statistics.items()
        }

    lead = weight.ndim - 1
    if lead == 0:
        states = one(seen.states, weight, x, full)
        return Seen(states, seen.tokens + weight.sum(-1), bad)

    def flat(tree: Any) -> Any:
        return jax.tree.map(lambda a: a.reshape(-1, *a.shape[lead:]), tree)

    own = flat((seen.states, weight))
    if x.ndim == 2:
        new = jax.lax.map(lambda a: one(a[0], a[1], x, full), own)
    else:
        every = (*own, *flat((x, full)))
        new = jax.lax.map(lambda a: one(*a), every)
    states = jax.tree.map(lambda n, o: n.reshape(o.shape), new, seen.states)
    return Seen(states, seen.tokens + weight.sum(-1), bad)


def merged(statistics: Statistics, a: Seen, b: Seen) -> Seen:
    """What both have seen."""

    def one(a: Any, b: Any) -> Any:
        return {n: each.merge(a[n], b[n]) for n, each in statistics.items()}

    for _ in range(a.tokens.ndim):
        one = jax.vmap(one)
    return Seen(one(a.states, b.states), a.tokens + b.tokens, a.bad + b.bad)


def _mapped(f: Any, lead: int) -> Any:
    """`f` over so many leading axes."""
    return _mapped(jax.vmap(f), lead - 1) if lead else f


def finalized(statistics: Statistics, seen: Seen) -> dict[str, Any]:
    """What solvers read, by name, with the experts' axes in front."""
    lead = seen.tokens.ndim

    def one(states: Any) -> Any:
        return {n: each.finalize(states[n]) for n, each in statistics.items()}

    return _mapped(one, lead)(seen.states)
