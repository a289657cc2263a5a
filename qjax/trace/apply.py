"""`apply`: a function, unchanged, on quantized parameters."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

import jax

from qjax import ops
from qjax.core.carrier import Carrier
from qjax.core.layout import Layout
from qjax.core.qtensor import QTensor, Stacked, is_quantized
from qjax.ops import Target
from qjax.ops.conv import conv_contraction
from qjax.ops.ragged import ragged_contraction
from qjax.trace.contractions import Call
from qjax.trace.control import QuantizationWarning, interpreter
from qjax.trace.program import Program, require_loaded, trace
from qjax.trace.views import Tracked, View, atom_roles


def apply(
    f: Callable[..., Any],
    *,
    implementation: str = "auto",
    target: Target | None = None,
) -> Callable[..., Any]:
    """`f` on parameters of which some are quantized.

    `apply(f)(qparams, *inputs)` traces `f` on shapes, replaces every contraction of a
    quantized leaf by the low-bit operation, and evaluates the rest as it stands. It is
    an ordinary JAX function: jit, grad, vmap and shard it; nothing is kept between
    calls, so call it under `jax.jit`. With float parameters it is `f` itself. A leaf
    that meets an operation with no low-bit rule is dequantized there, with a
    `QuantizationWarning` that names it (`qjax.sites(f, qparams, *inputs)` lists how
    every site runs). Rounding of a coded activation has the gradient of the identity.

    Args:
      f: `f(params, *inputs)`.
      implementation: of matrix products: "auto" takes a Pallas kernel where one suits,
        else XLA (`qjax.explain` lists which, and why); "xla"; or "pallas", which makes
        a product without a kernel an error.
      target: hardware to choose for; default that of this process.

    Returns:
      A function of the same arguments.

    Raises:
      TypeError: a leaf is still on disk (`LazyLeaf`).
      ValueError: `implementation` is unknown, or "pallas" where there is no kernel.
    """
    rule = partial(low_bit, implementation=implementation, target=target)

    @wraps(f)
    def applied(params: Any, *inputs: Any, **options: Any) -> Any:
        leaves = jax.tree.leaves(params, is_leaf=is_quantized)
        require_loaded(params)
        if not any(is_quantized(x) for x in leaves):
            return f(params, *inputs, **options)
        return evaluated(trace(f, params, inputs, options), interpreter(rule))

    return applied


def evaluated(program: Program, body: Any) -> Any:
    """What the program returns, run by an interpreter, in its own structure."""
    operands = program.operands(track=is_quantized)
    outputs = body.run(program.jaxpr, program.consts, operands)
    flat = body.as_floats("return", outputs, "returned by the function")
    warn_of(program, body.events)
    return jax.tree.unflatten(program.out_tree, flat)


def warn_of(program: Program, events: list[Any]) -> None:
    """Warn of leaves that met an operation without a low-bit rule."""
    found = dict.fromkeys(
        f"{program.paths[e.leaf]} is {e.runs}"
        for e in events
        if e.leaf is not None and e.runs.startswith(("dequantized", "not placed"))
    )
    for message in found:
        warnings.warn(message, QuantizationWarning, stacklevel=3)


def low_bit(
    eqn: Any,
    call: Call,
    weight: Tracked,
    operands: list[Any],
    site: int,
    *,
    implementation: str = "auto",
    target: Target | None = None,
) -> tuple[Any, str]:
    """The rule of `apply`: a quantized leaf meets its activation in low bits."""
    q = weight.value
    if not weight.quantized:
        return None, "float"
    reason = refusal(q, weight, call)
    if reason:
        return None, f"dequantized: {reason}"
    how = {"implementation": implementation, "target": target}
    run = {
        "dot": partial(_dot, **how),
        "conv": _conv,
        "ragged_dot": partial(_ragged, **how),
        "embedding": _embedding,
    }[call.kind]
    return run(eqn, call, weight, operands, site), f"low-bit: {runs_as(call, q, site)}"


def runs_as(
    call: Call, q: QTensor, site: int, chosen: tuple[ops.Choice, ...] = ()
) -> str:
    """In words, how a site runs on a leaf's codes, as `chosen` if that is known."""
    if call.kind == "embedding":
        return f"{q.parts[0].format.name} rows, decoded after the lookup"
    if call.kind == "ragged_dot" and ragged_contraction(q, site) == "int":
        return ops.how(q, site, chosen)
    if call.kind == "ragged_dot":
        activation = "float" if q.site(site).activation is None else "coded, as floats"
        return f"{q.parts[0].format.name}, activations {activation}"
    if call.kind == "conv":
        ways = {
            "int": "int8 convolved into int32",
            "scaled": "codes convolved, scale on the result",
            "values": "kernel decoded in the operation",
        }
        return f"{q.parts[0].format.name}, {ways[conv_contraction(q, site)]}"
    return ops.how(q, site, chosen)


def refusal(q: QTensor | Stacked, weight: Tracked, call: Call) -> str:
    """Why a leaf cannot be contracted as it is coded; empty if it can."""
    if isinstance(q, Stacked):
        return "layers of several formats are used at once"
    otherwise = other_axes(q, weight, call)
    if otherwise:
        return otherwise
    extra = _extra(q, call)
    if extra:
        return f"{extra} in a {call.kind} site"
    if call.kind == "embedding" and q.lead:
        return "an embedding with leading axes"
    used = call.roles
    whole = len(set(weight.view.owner)) == len(weight.view.owner)
    if "b" in used and not whole:
        return "batched axes were reshaped"
    return ""


def other_axes(leaf: QTensor | Carrier, weight: Tracked, call: Call) -> str:
    """How the leaf is used otherwise than it is coded; empty if it is not."""
    coded, used = atom_roles(leaf, weight.view), call.roles
    pairs = zip(coded, used, weight.view.atoms)
    if any(a != b for a, b, size in pairs if size != 1):
        return f"coded with axes {coded!r}, used with axes {used!r}"
    return ""


def _extra(q: QTensor, call: Call) -> str:
    """Parts of a leaf that the operation of this kind of site does not take."""
    found = {
        "low rank": q.left is not None and call.kind != "embedding",
        "outliers": q.sparse is not None,
        "a bias": q.bias is not None and call.kind != "conv",
        "transforms": q.moved,
    }
    if call.kind == "dot":
        return ""
    return ", ".join(name for name, there in found.items() if there)


@dataclass(frozen=True)
class Arrange:
    """A kernel's matrix `[K, N]` to the axes that its convolution sees."""

    view: View
    layout: Layout

    def __call__(self, matrix: Any) -> Any:
        """The kernel."""
        return self.view.of_array(self.layout.from_matrix(matrix))


def _dot(
    eqn: Any,
    call: Call,
    weight: Tracked,
    operands: list[Any],
    site: int,
    *,
    implementation: str,
    target: Target | None,
) -> Any:
    out = eqn.outvars[0].aval
    y = ops.matmul(
        call.matrix(operands[call.operand]),
        weight.value,
        site=site,
        dtype=out.dtype,
        weight_dtype=weight.dtype,
        precision=eqn.params["precision"],
        implementation=implementation,
        target=target,
    )
    return call.finish(y)


def _conv(eqn: Any, call: Call, weight: Tracked, operands: list[Any], site: int) -> Any:
    names = (
        "window_strides",
        "padding",
        "lhs_dilation",
        "rhs_dilation",
        "dimension_numbers",
        "feature_group_count",
        "precision",
    )

    return ops.conv(
        operands[0],
        weight.value,
        Arrange(weight.view, weight.value.layout),
        {name: eqn.params[name] for name in names},
        site=site,
        dtype=eqn.outvars[0].aval.dtype,
    )


def _ragged(
    eqn: Any,
    call: Call,
    weight: Tracked,
    operands: list[Any],
    site: int,
    *,
    implementation: str,
    target: Target | None,
) -> Any:
    return ops.ragged_matmul(
        operands[0],
        weight.value,
        operands[2],
        site=site,
        dtype=eqn.outvars[0].aval.dtype,
        weight_dtype=weight.dtype,
        precision=eqn.params["precision"],
        implementation=implementation,
        target=target,
    )


def _embedding(
    eqn: Any, call: Call, weight: Tracked, operands: list[Any], site: int
) -> Any:
    fill = None
    if "FILL" in str(eqn.params["mode"]).upper():
        given = eqn.params["fill_value"]
        fill = float("nan") if given is None else float(given)
    ids = operands[1][..., 0]
    rows = ops.embed(ids, weight.value, dtype=weight.dtype, fill=fill)
    return call.finish(rows)
