"""Every contraction of a parameter, brought to `x[*batch, M, K] @ w[*batch, K, N]`."""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import jax.numpy as jnp

from qjax.core.layout import Layout
from qjax.trace.views import Tracked, View

CONTRACTIONS = frozenset(
    {"dot_general", "conv_general_dilated", "ragged_dot_general", "gather"}
)


@dataclass(frozen=True)
class Call:
    """One meeting of a parameter and an activation.

    `operand` is the position of the activation in the equation. `matrix` brings the
    activation to `[*batch, M, K]` (conv and embedding: leaves it alone), `finish`
    brings `y[*batch, M, N]` to the equation's output. `roles` has a letter for each
    atom of the weight's view; `layout` is the same for the leaf's own axes.
    """

    kind: str
    operand: int
    roles: str
    layout: Layout
    M: int
    matrix: Callable[[Any], Any]
    finish: Callable[[Any], Any]


def identity(x: Any) -> Any:
    """No change."""
    return x


def read_call(eqn: Any, weight: Tracked, position: int) -> Call | str:
    """The equation as a `Call`, or the reason why it is none."""
    name = eqn.primitive.name
    reader = {
        "dot_general": _dot,
        "conv_general_dilated": _conv,
        "ragged_dot_general": _ragged,
        "gather": _gather,
    }[name]
    return reader(eqn, weight.view, position)


def _dot(eqn: Any, view: View, position: int) -> Call | str:
    (contract, batch) = eqn.params["dimension_numbers"]
    wc, wb = tuple(contract[position]), tuple(batch[position])
    xc, xb = tuple(contract[1 - position]), tuple(batch[1 - position])
    roles = view.roles(wc, wb)
    layout = view.layout(roles)
    if layout is None:
        return "one axis of the leaf is both contracted and kept"
    if "k" not in layout.roles:
        return "nothing is contracted (an outer product)"
    free_w = tuple(d for d in range(len(view.axes)) if d not in wc + wb)
    shape = tuple(eqn.invars[1 - position].aval.shape)
    free_x = tuple(d for d in range(len(shape)) if d not in xc + xb)
    k_atoms = tuple(a for d in wc for a in view.axes[d])
    b_atoms = tuple(a for d in wb for a in view.axes[d])
    n_atoms = tuple(a for d in free_w for a in view.axes[d])
    free_sizes = tuple(shape[d] for d in free_x)
    sizes = view.atoms
    M = prod(free_sizes)

    def matrix(x: Any) -> Any:
        moved = jnp.transpose(x, (*xb, *free_x, *xc))
        b_sizes = tuple(sizes[a] for a in b_atoms)
        split = moved.reshape(*b_sizes, *free_sizes, *(sizes[a] for a in k_atoms))
        nb, nf = len(b_atoms), len(free_sizes)
        order = (
            *_ascending(b_atoms),
            *range(nb, nb + nf),
            *(nb + nf + i for i in _ascending(k_atoms)),
        )
        lead = tuple(sizes[a] for a in sorted(b_atoms))
        return jnp.transpose(split, order).reshape(*lead, M, layout.K)

    def finish(y: Any) -> Any:
        lead, kept = sorted(b_atoms), sorted(n_atoms)
        split = y.reshape(
            *(sizes[a] for a in lead), *free_sizes, *(sizes[a] for a in kept)
        )
        nb, nf = len(lead), len(free_sizes)
        batch_order = tuple(lead.index(a) for a in b_atoms)
        x_order = tuple(range(nb, nb + nf))
        w_order = tuple(nb + nf + kept.index(a) for a in n_atoms)
        rest = (*x_order, *w_order) if position == 1 else (*w_order, *x_order)
        moved = jnp.transpose(split, (*batch_order, *rest))
        return moved.reshape(eqn.outvars[0].aval.shape)

    return Call("dot", 1 - position, roles, layout, M, matrix, finish)


def _ascending(atoms: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(range(len(atoms)), key=atoms.__getitem__))


def _conv(eqn: Any, view: View, position: int) -> Call | str:
    if position != 1:
        return "the parameter is the image of a convolution, not its kernel"
    if eqn.params["batch_group_count"] != 1:
        return "batch_group_count is not 1"
    out_axis = eqn.params["dimension_numbers"].rhs_spec[0]
    contracted = tuple(d for d in range(len(view.axes)) if d != out_axis)
    roles = view.roles(contracted, ())
    layout = view.layout(roles)
    if layout is None:
        return "one axis of the leaf is both contracted and kept"
    out = eqn.outvars[0].aval.shape
    M = prod(out) // max(1, out[eqn.params["dimension_numbers"].out_spec[1]])
    return Call("conv", 0, roles, layout, M, identity, identity)


def _ragged(eqn: Any, view: View, position: int) -> Call | str:
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (contract, batch) = numbers.dot_dimension_numbers
    plain = (
        position == 1
        and tuple(numbers.lhs_ragged_dimensions) == (0,)
        and tuple(numbers.rhs_group_dimensions) == (0,)
        and tuple(map(tuple, contract)) in (((1,), (1,)), ((1,), (2,)))
        and not batch[0]
    )
    if not plain:
        return "this form of ragged_dot has no low-bit rule"
    kept = 2 if contract[1][0] == 1 else 1
    roles = view.roles((contract[1][0],), (0,))
    layout = view.layout(roles)
    whole = all(len(view.axes[d]) == 1 for d in (0, kept, contract[1][0]))
    if layout is None or not whole:
        return "one axis of the leaf is both contracted and kept"
    M = eqn.invars[0].aval.shape[0]
    return Call("ragged_dot", 0, roles, layout, M, identity, identity)


def _gather(eqn: Any, view: View, position: int) -> Call | str:
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    shape = view.shape
    rows = tuple(numbers.start_index_map)
    lookup = (
        position == 0
        and len(rows) == 1
        and tuple(numbers.collapsed_slice_dims) == rows
        and not numbers.operand_batching_dims
        and all(s == shape[d] for d, s in enumerate(sizes) if d != rows[0])
        and sizes[rows[0]] == 1
        and len(shape) >= 2
    )
    if not lookup:
        return "a gather that is not a lookup of whole rows"
    contracted = tuple(d for d in range(len(shape)) if d != rows[0])
    roles = view.roles(contracted, ())
    layout = view.layout(roles)
    if layout is None:
        return "one axis of the leaf is both gathered and kept"
    M = prod(eqn.invars[1].aval.shape[:-1])
    sizes_k = tuple(shape[d] for d in contracted)
    k_atoms = tuple(a for d in contracted for a in view.axes[d])

    def finish(y: Any) -> Any:
        """`y[*ids, K]`, K in leaf order, to the gather's output."""
        ids = y.shape[:-1]
        kept = sorted(k_atoms)
        split = y.reshape(*ids, *(view.atoms[a] for a in kept))
        order = (*range(len(ids)), *(len(ids) + kept.index(a) for a in k_atoms))
        rows_first = jnp.transpose(split, order).reshape(*ids, *sizes_k)
        offset = tuple(numbers.offset_dims)
        total = len(ids) + len(sizes_k)
        batch = [d for d in range(total) if d not in offset]
        place = {d: i for i, d in enumerate((*batch, *offset))}
        return jnp.transpose(rows_first, [place[d] for d in range(total)])

    return Call("embedding", 1, roles, layout, M, identity, finish)
