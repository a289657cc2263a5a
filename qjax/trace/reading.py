"""How an equation reads its activation: equal readings give equal `x[M, K]`."""

from collections.abc import Sequence
from typing import Any

from qjax.trace.contractions import Call
from qjax.trace.tape import Op
from qjax.trace.views import View


def reading(op: Op, call: Call, view: View) -> tuple[Any, ...]:
    """Comparable for two meetings of one activation.

    The order of K counts too: it is that of the leaf's own axes, which may differ
    between two leaves that contract the same axes of the activation.
    """
    eqn = op.eqn
    name = eqn.primitive.name
    if name == "dot_general":
        contract, batch = eqn.params["dimension_numbers"]
        mine, other = call.operand, 1 - call.operand
        orders = [_order(view, dims[other]) for dims in (contract, batch)]
        return name, tuple(contract[mine]), tuple(batch[mine]), *orders
    if name == "conv_general_dilated":
        shown = {k: v for k, v in eqn.params.items() if k != "preferred_element_type"}
        kernel = eqn.invars[1].aval.shape
        window = eqn.params["dimension_numbers"].rhs_spec[1:]
        order = _order(view, window)
        return name, str(shown), tuple(kernel[d] for d in window), order
    return name, *(str(x) for x in op.ins[2:])


def _order(view: View, dims: Sequence[int]) -> Any:
    """Where the leaf has these axes; None if it has them in this order."""
    atoms = [a for d in dims for a in view.axes[d]]
    if atoms == sorted(atoms):
        return None
    ranks = tuple(sorted(atoms).index(a) for a in atoms)
    return ranks, tuple(view.atoms[a] for a in atoms)
