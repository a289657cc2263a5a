"""`explain`: which implementation runs at every site, and why another does not."""

from collections.abc import Callable
from functools import partial
from typing import Any

from qjax.ops import Target
from qjax.ops.elements import elements_choice
from qjax.ops.matmul import chosen_for, promoted, rotation_for
from qjax.ops.ragged import ragged_chosen_for
from qjax.ops.targets import here
from qjax.trace.apply import low_bit, runs_as
from qjax.trace.contractions import Call
from qjax.trace.program import trace
from qjax.trace.sites import Sites, sites_of
from qjax.trace.views import Tracked


def explain(
    f: Callable[..., Any],
    params: Any,
    *example: Any,
    implementation: str = "auto",
    target: Target | None = None,
    **options: Any,
) -> Sites:
    """The sites of `f`, with the implementation of each in `runs`.

    Nothing is computed. `print(qjax.explain(f, qparams, x).table())` shows for every
    site how `qjax.apply(f)` runs it: `low-bit: int4 g128, float activations; pallas
    v5e`, or `...; xla, no pallas: <why>`.

    Args:
      f: `f(params, *inputs)`.
      params: arrays, shapes or QTensors.
      example: inputs, or their shapes.
      implementation: as for `apply`.
      target: hardware to choose for, such as `qjax.Target("tpu", "v6e")`; default
        that of this process.
      options: passed to `f`.

    Raises:
      ValueError: `implementation` is unknown, or "pallas" where there is no kernel.
    """
    rule = partial(_explaining, implementation=implementation, target=target)
    return sites_of(f, trace(f, params, example, options), rule)


def _explaining(
    eqn: Any,
    call: Call,
    weight: Tracked,
    operands: list[Any],
    site: int,
    *,
    implementation: str,
    target: Target | None,
) -> tuple[Any, str]:
    output, runs = low_bit(
        eqn, call, weight, operands, site, implementation=implementation, target=target
    )
    if output is None:
        return output, runs
    q, x = weight.value, operands[call.operand]
    if call.kind == "ragged_dot":
        x = promoted(x, q, weight.dtype)
        chosen = (ragged_chosen_for(x, q, site, implementation, target),)
        runs = f"low-bit: {runs_as(call, q, site, chosen)}"
    elif call.kind == "dot":
        x = promoted(call.matrix(x), q, weight.dtype)
        chosen = chosen_for(x, q, site, implementation, target)
        runs = f"low-bit: {runs_as(call, q, site, chosen)}"
        turning = rotation_for(x, q, site, implementation, target)
        if turning is not None:
            runs = f"{runs}, rotated by {_names((turning,))}"
        elements = elements_choice(q, x, implementation, target or here())
        if elements is not None:
            spread = "" if elements.generation else ", spread over a float matrix"
            runs = f"{runs} by {elements.name}{spread}{_refusals((elements,))}"
    else:
        return output, f"{runs}; xla, no pallas: there is no kernel for {call.kind}"
    return output, f"{runs}; {_names(chosen)}{_refusals(chosen)}"


def _names(chosen: Any) -> str:
    return " + ".join(dict.fromkeys(choice.name for choice in chosen)) or "xla"


def _refusals(chosen: Any) -> str:
    reasons = dict.fromkeys(c.refused for c in chosen if c.refused)
    return f", no pallas: {', '.join(reasons)}" if reasons else ""
