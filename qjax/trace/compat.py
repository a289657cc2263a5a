"""The only file of the library that touches a private or version-dependent JAX name.

Everything here *reads* a jaxpr; bodies are re-emitted elsewhere through public
functions. Tested on JAX 0.10.2 and 0.11.x.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import jax
from jax._src import source_info_util
from jax.extend import core

Literal = core.Literal

JIT = frozenset({"jit", "pjit", "closed_call", "core_call"})
REMAT = frozenset({"remat2", "checkpoint", "remat"})
CUSTOM = frozenset({"custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"})


def body(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """An open or closed jaxpr as `(jaxpr, constants)`.

    JAX 0.10 has two types; in 0.11 every jaxpr has `jaxpr` and `consts`.
    """
    if hasattr(jaxpr, "jaxpr") and hasattr(jaxpr, "consts"):
        return jaxpr.jaxpr, jaxpr.consts
    return jaxpr, ()


def is_jaxpr(value: Any) -> bool:
    """Whether a parameter of an equation is a jaxpr, open or closed."""
    return hasattr(value, "eqns") or isinstance(value, (core.Jaxpr, core.ClosedJaxpr))


def is_literal(atom: Any) -> bool:
    """Whether an equation's operand is a constant written in place."""
    return isinstance(atom, core.Literal)


def kind(eqn: Any) -> str:
    """The primitive's name, the higher-order ones under one name per meaning."""
    name = eqn.primitive.name
    for meaning, names in (("jit", JIT), ("remat", REMAT), ("custom", CUSTOM)):
        if name in names:
            return meaning
    if name == "call_hi_primitive":
        traced = type(eqn.params["_prim"]).__name__
        return {"RematTraced": "remat", "CustomVJPTraced": "custom"}.get(traced, name)
    return name


def holds(eqn: Any, name: str) -> bool:
    """Whether an equation is of that primitive, or a body of it holds one."""
    bodies = core.jaxprs_in_params(eqn.params)
    inner = (each for jaxpr in bodies for each in body(jaxpr)[0].eqns)
    return eqn.primitive.name == name or any(holds(each, name) for each in inner)


def call_body(eqn: Any) -> tuple[Any, Sequence[Any]]:
    """The body of a jit, remat, custom-derivative or shard_map equation."""
    hi = eqn.params.get("_prim")
    if hi is not None:
        return body(hi.jaxpr if hasattr(hi, "jaxpr") else hi.traced.jaxpr)
    for field in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if field in eqn.params:
            return body(eqn.params[field])
    raise KeyError(f"primitive {eqn.primitive.name} has no body under a known name")


def shardings(eqn: Any) -> tuple[list[Any], list[Any]]:
    """Where a jit equation asks for its operands and results; None: anywhere."""

    def known(name: str, count: int) -> list[Any]:
        asked = eqn.params.get(name, (None,) * count)
        return [s if isinstance(s, jax.sharding.Sharding) else None for s in asked]

    ins = known("in_shardings", len(eqn.invars))
    return ins, known("out_shardings", len(eqn.outvars))


def remat_options(eqn: Any) -> dict[str, Any]:
    """Arguments that rebuild `jax.checkpoint`."""
    source = eqn.params.get("_prim", None)
    read = eqn.params.get if source is None else lambda n: getattr(source, n, None)
    prevent_cse = read("prevent_cse")
    options = {"policy": read("policy")}
    return options if prevent_cse is None else {**options, "prevent_cse": prevent_cse}


def scan_groups(eqn: Any) -> tuple[int, int]:
    """How many constants and carried values a scan has."""
    if "ft_in" in eqn.params:
        consts, carry, _ = (len(g) for g in eqn.params["ft_in"].unpack())
        return consts, carry
    return eqn.params["num_consts"], eqn.params["num_carry"]


def has_bodies(eqn: Any) -> bool:
    """Whether an equation holds jaxprs that the interpreter can enter."""
    entered = {"jit", "remat", "custom", "scan", "cond", "while", "shard_map"}
    return kind(eqn) in entered


def names_in(jaxpr: Any) -> set[str]:
    """What `checkpoint_name` calls values of a program, in nested bodies too."""
    own = {eqn.params["name"] for eqn in jaxpr.eqns if kind(eqn) == "name"}
    return own.union(*(names_in_bodies(eqn) for eqn in jaxpr.eqns))


def names_in_bodies(eqn: Any) -> set[str]:
    """The names in the bodies of an equation."""
    inner = bodies(eqn)
    return set[str]().union(*(names_in(jaxpr) for jaxpr in inner))


def bodies(eqn: Any) -> list[Any]:
    """Every jaxpr among an equation's parameters."""
    return _bodies(list(eqn.params.values()))


def _bodies(values: Any) -> list[Any]:
    found = []
    for x in values:
        if isinstance(x, (tuple, list)):
            found += _bodies(x)
        elif hasattr(x, "eqns") or hasattr(x, "jaxpr"):
            found.append(getattr(x, "jaxpr", x))
    return found


def bind(eqn: Any, operands: Sequence[Any]) -> list[Any]:
    """Evaluate an equation as it stands."""
    params = eqn.primitive.get_bind_params(eqn.params)
    if isinstance(params, tuple):  # JAX before 0.10 returned (subfuns, params)
        out = eqn.primitive.bind(*params[0], *operands, **params[1])
    else:
        out = eqn.primitive.bind(*operands, **params)
    return list(out) if eqn.primitive.multiple_results else [out]


def context(eqn: Any) -> AbstractContextManager:
    """The equation's mesh, compute and name-stack context, for re-emission."""
    stack = ExitStack()
    names = source_info_util.current_name_stack() + eqn.source_info.name_stack
    traceback = eqn.source_info.traceback
    stack.enter_context(source_info_util.user_context(traceback, name_stack=names))
    stack.enter_context(eqn.ctx.manager)
    return stack
