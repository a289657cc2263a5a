"""Two streams of one program, float and quantized, whose rows stay paired.

Where a program sorts or gathers by what it computes (the routing of a mixture of
experts), each stream would move its rows by values of its own, and row `i` of one is
another token than row `i` of the other. Here both streams take the quantized stream's
decisions: every integer of 16 bits or more is the one that the quantized stream
computed, and `top_k` and `sort` pick from the full-precision values what they picked
from the quantized ones. All that moves a row is then the same in both, and the
full-precision stream is the full-precision model under the quantized model's routing.
Integers of 8 bits are codes of numbers, and stay each stream's own.

Control flow, kernels and factorizations that turn floats into integers inside and give
floats are not followed: behind them rows may be other tokens, see `unpaired`.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from qjax.trace import compat
from qjax.trace.segments import Code, Programs, Segment, outputs_of, reader
from qjax.trace.tape import Meeting, Op, Region, Tape

CALLS = ("jit", "remat", "custom")
SELECTIONS = ("top_k", "approx_top_k")


def _sort(aval: Any) -> str:
    dtype = getattr(aval, "dtype", None)
    if dtype is None or jnp.issubdtype(dtype, jax.dtypes.extended):
        return ""
    if jnp.issubdtype(dtype, jnp.inexact):
        return "float"
    if dtype == jnp.bool_:
        return "bool"
    return "index" if dtype.itemsize > 1 else "code"


def _steps(eqns: Iterable[Any]) -> set[tuple[str, str]]:
    """From what to what any equation goes, in nested bodies too."""
    found: set[tuple[str, str]] = set()
    for eqn in eqns:
        bodies = compat.bodies(eqn)
        if bodies:
            found |= _steps(e for body in bodies for e in body.eqns)
            continue
        ins, outs = ({_sort(v.aval) for v in vs} for vs in (eqn.invars, eqn.outvars))
        found |= {(a, b) for a in ins for b in outs if a != b}
        if eqn.primitive.name == "sort" and "float" in ins:
            found.add(("float", "index"))
    return found


def decides(ops: Sequence[Op]) -> bool:
    """Whether operations may make an index of a float."""
    steps = _steps(op.eqn for op in ops)
    compared = {("float", "bool"), ("bool", "index")}
    return ("float", "index") in steps or compared <= steps


def unpaired(tape: Tape, place: int) -> str:
    """What of the program up to a place may move rows in a way that is not followed.

    Returns:
      The name of the primitive; empty where rows are paired.
    """
    for op in tape.ops[:place]:
        found = _lost([op.eqn])
        if found:
            return found
    at = tape.ops[place]
    return at.kind if isinstance(at, Region) else ""


def _lost(eqns: Iterable[Any]) -> str:
    for eqn in eqns:
        kind = compat.kind(eqn)
        if kind in CALLS:
            found = _lost(compat.call_body(eqn)[0].eqns)
            if found:
                return found
            continue
        known = eqn.primitive.name in (*SELECTIONS, "sort")
        steps = _steps([eqn]) & {("float", "index"), ("bool", "index")}
        floats = any(_sort(v.aval) == "float" for v in eqn.outvars)
        if steps and floats and not known:
            return eqn.primitive.name
    return ""


def evaluate_pair(
    tape: Tape, segment: Segment, leaves: Any, consts: Any, ins: Any
) -> list[tuple[Any, Any]]:
    """The segment's outputs in both streams; `leaves` and `ins` are pairs of lists."""
    constants = dict(zip(segment.constants, consts))
    held = [dict(zip(segment.leaves, each)) for each in leaves]
    envs = [constants | dict(zip(segment.ins, each)) for each in ins]
    reads = [reader(tape, *each) for each in zip(held, envs)]
    for op in segment.ops:
        with compat.context(op.eqn):
            if isinstance(op, (Meeting, Region)):
                pair = [outputs_of(op, tape, r, h) for r, h in zip(reads, held)]
                low, full = pair[0], _indices(*pair)
            else:
                low, full = _pair(op.eqn, *([r(x) for x in op.ins] for r in reads))
        for env, outs in zip(envs, (low, full)):
            env |= dict(zip(op.outs, outs))
    return [(envs[0][x], envs[1][x]) for x in segment.outs]


def _indices(low: Sequence[Any], full: Sequence[Any]) -> list[Any]:
    """The full-precision values, with the indices of the quantized stream."""
    return [a if _sort(jax.typeof(a)) == "index" else b for a, b in zip(low, full)]


def _pair(eqn: Any, low: Sequence[Any], full: Sequence[Any]) -> tuple[Any, Any]:
    """What an equation gives in both streams."""
    name = eqn.primitive.name
    if compat.kind(eqn) in CALLS:
        return _body(*compat.call_body(eqn), low, full)
    if name in SELECTIONS:
        values, chosen = compat.bind(eqn, low)
        axis = eqn.params.get("axis", eqn.params.get("reduction_dimension", -1))
        return [values, chosen], [jnp.take_along_axis(full[0], chosen, axis), chosen]
    if name == "sort":
        return _sorted(eqn, low, full)
    outs = compat.bind(eqn, low)
    return outs, _indices(outs, compat.bind(eqn, full))


def _sorted(eqn: Any, low: Sequence[Any], full: Sequence[Any]) -> tuple[Any, Any]:
    p, axis = eqn.params, eqn.params["dimension"]
    place = jax.lax.broadcasted_iota(jnp.int32, low[0].shape, axis)
    options = {"is_stable": p["is_stable"], "num_keys": p["num_keys"]}
    *outs, order = jax.lax.sort((*low, place), dimension=axis, **options)
    moved = [jnp.take_along_axis(x, order, axis) for x in full]
    return outs, _indices(outs, moved)


def _body(
    jaxpr: Any, consts: Sequence[Any], low: Sequence[Any], full: Sequence[Any]
) -> tuple[Any, Any]:
    known = dict(zip(jaxpr.constvars, consts))
    envs = [known | dict(zip(jaxpr.invars, each)) for each in (low, full)]

    def read(env: dict[Any, Any], v: Any) -> Any:
        return v.val if compat.is_literal(v) else env[v]

    for eqn in jaxpr.eqns:
        with compat.context(eqn):
            pair = _pair(eqn, *([read(env, v) for v in eqn.invars] for env in envs))
        for env, outs in zip(envs, pair):
            env |= dict(zip(eqn.outvars, outs))
    first, second = ([read(env, v) for v in jaxpr.outvars] for env in envs)
    return first, second


@partial(jax.jit, static_argnums=0)
def _run_code(code: Code, leaves: Any, consts: Any, ins: Any) -> list[Any]:
    return evaluate_pair(*code.piece, leaves, consts, ins)


def run_pair(
    programs: Programs, tape: Tape, segment: Segment, leaves: Any, consts: Any, ins: Any
) -> tuple[list[Any], list[Any]]:
    """The segment's outputs in the quantized and in the full-precision stream."""
    code = Code(segment.key, (tape, segment))
    pairs = programs.call(_run_code, code, leaves, consts, ins)
    return [low for low, _ in pairs], [full for _, full in pairs]
