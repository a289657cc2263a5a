"""Re-emission of equations that hold bodies, with parameters passing through them."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from qjax.core.carrier import Carrier
from qjax.core.qtensor import QTensor
from qjax.trace import compat, scan, sharded
from qjax.trace.interpret import Body, Rule
from qjax.trace.nested import Notes, restore, sources_of, unchanged, without
from qjax.trace.views import Joined, Tracked, as_array


class QuantizationWarning(UserWarning):
    """Something ran differently from what the user may expect."""


def interpreter(
    rule: Rule,
    everything: bool = False,
    names: Mapping[str, Callable[[Any], Any]] | None = None,
) -> Body:
    """A fresh interpreter for a whole program."""
    return Body(rule, ENTER, everything, names or {})


def enter_jit(outer: Body, eqn: Any, operands: list[Any], number: int) -> list[Any]:
    """A nested jit stays one: layers of equal structure are traced and lowered once."""
    jaxpr, consts = compat.call_body(eqn)
    given = outer.renumber(operands)
    constrain_in, constrain_out = compat.shardings(eqn)
    key = (id(jaxpr), jax.tree.structure(given), outer.everything)
    if key not in outer.cache:
        notes = Notes()

        def call(*args: Any) -> tuple[list[Any], list[Any]]:
            inner = outer.nested()
            out = inner.run(jaxpr, consts, _placed(args, constrain_in))
            return _placed(out, constrain_out), notes.keep(inner.events)

        call.__name__ = str(eqn.params.get("name", "jit"))
        # The jaxpr is kept with its entry: an id is unique only while it lives.
        outer.cache[key] = (jax.jit(call), notes, jaxpr)
    jitted, notes, _ = outer.cache[key]
    outputs, seen = jitted(*given)
    events = notes.with_seen(seen)
    outer.adopt(events, operands, sources_of(outer, eqn), number)
    return restore(outputs, operands)


def _placed(values: Sequence[Any], shardings: Sequence[Any]) -> list[Any]:
    """Arrays where a nested jit asked for them; parameters stay where they are."""
    return [
        x
        if s is None or isinstance(x, (Tracked, Joined))
        else jax.lax.with_sharding_constraint(x, s)
        for x, s in zip(values, shardings)
    ]


def enter_remat(outer: Body, eqn: Any, operands: list[Any], number: int) -> list[Any]:
    """`jax.checkpoint` with its policy."""
    jaxpr, consts = compat.call_body(eqn)
    notes = Notes()

    def call(*args: Any) -> tuple[list[Any], list[Any]]:
        inner = outer.nested()
        out = inner.run(jaxpr, consts, args)
        return out, notes.keep(inner.events)

    outputs, seen = jax.checkpoint(call, **compat.remat_options(eqn))(
        *outer.renumber(operands)
    )
    events = notes.with_seen(seen)
    outer.adopt(events, operands, sources_of(outer, eqn), number)
    return restore(outputs, operands)


@jax.custom_jvp
def inlined(x: Any) -> Any:
    """The output of a custom-derivative function whose body holds a low-bit site."""
    return x


@inlined.defjvp
def _inlined_jvp(primals: Any, tangents: Any) -> Any:
    warnings.warn(
        "a function with a custom derivative holds a quantized parameter; its body is "
        "differentiated instead of its own rule",
        QuantizationWarning,
        stacklevel=2,
    )
    return primals[0], tangents[0]


def enter_custom(outer: Body, eqn: Any, operands: list[Any], number: int) -> list[Any]:
    """A custom-derivative call around a site is inlined; its own rule is lost."""
    jaxpr, consts = compat.call_body(eqn)
    inner = outer.nested()
    outputs = inner.run(jaxpr, consts, outer.renumber(operands))
    outer.adopt(inner.events, operands, sources_of(outer, eqn), number)
    low_bit = any(isinstance(x, Tracked) and x.quantized for x in operands)
    if low_bit:
        outputs = [
            inlined(x) if not isinstance(x, (Tracked, Joined)) and _float(x) else x
            for x in outputs
        ]
    return restore(outputs, operands)


def _float(x: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jnp.floating)


def enter_cond(outer: Body, eqn: Any, operands: list[Any], number: int) -> list[Any]:
    """`lax.switch`: the branches see the same parameters.

    The sites of a leaf are numbered through one branch after the other.
    """
    index, given = as_array(operands[0]), outer.renumber(operands)[1:]
    notes = [Notes() for _ in eqn.params["branches"]]

    def branch(closed: Any, note: Notes) -> Any:
        jaxpr, consts = compat.body(closed)
        before = notes[: notes.index(note)]

        def call(*args: Any) -> list[Any]:
            inner = outer.nested()
            sources = [("arg", i + 1) for i in range(len(args))]
            out = inner.run(jaxpr, consts, _after(before, args), sources)
            flat = inner.as_floats("cond", out, "leaves a cond")
            note.refuse(inner.events, "cond")
            return flat

        return call

    calls = [branch(b, n) for b, n in zip(eqn.params["branches"], notes)]
    outputs = jax.lax.switch(index, calls, *given)
    for note in notes:
        outer.adopt(note.events, operands, sources_of(outer, eqn), number)
    return list(outputs)


def _after(before: Sequence[Notes], args: Sequence[Any]) -> list[Any]:
    """Parameters whose sites are counted on from those in earlier bodies."""

    def one(x: Any) -> Any:
        if not isinstance(x, Tracked) or not isinstance(x.value, (QTensor, Carrier)):
            return x
        if len(x.value.acts) < 2:
            return x
        mine = (e for n in before for e in n.events if e.leaf == x.leaf)
        return replace(x, base=x.base + sum(e.kind != "other" for e in mine))

    return [one(x) for x in args]


def enter_while(outer: Body, eqn: Any, operands: list[Any], number: int) -> list[Any]:
    """`lax.while_loop`; parameters are constants of the loop."""
    p = eqn.params
    test_jaxpr, test_consts = compat.body(p["cond_jaxpr"])
    jaxpr, consts = compat.body(p["body_jaxpr"])
    n_test, n_body = p["cond_nconsts"], p["body_nconsts"]
    split = n_test + n_body
    carried = range(n_body, len(jaxpr.invars))
    fixed = {i + n_test for i in unchanged(jaxpr, carried)}
    operands = without(outer, eqn, operands, lambda i, _: i < split or i in fixed)
    given = outer.renumber(operands)
    held = given[:split]
    moving = [x for i, x in enumerate(given) if i >= split and i not in fixed]
    notes, tested = Notes(), Notes()
    names = [
        ("carried" if i >= split and i not in fixed else "arg", i)
        for i in range(len(given))
    ]

    def everything(state: Sequence[Any]) -> list[Any]:
        rest = iter(state)
        return [
            x if i in fixed else next(rest)
            for i, x in enumerate(given[split:], start=split)
        ]

    def test(state: list[Any]) -> Any:
        args = [*held[:n_test], *everything(state)]
        where = names[:n_test] + names[split:]
        inner = outer.nested()
        out = inner.run(test_jaxpr, test_consts, args, where)[0]
        tested.refuse(inner.events, "while")
        return out

    def body(state: list[Any]) -> list[Any]:
        inner = outer.nested()
        args = [*held[n_test:], *everything(state)]
        out = inner.run(jaxpr, consts, _after([tested], args), names[n_test:])
        notes.refuse(inner.events, "while")
        kept = [x for i, x in enumerate(out, start=split) if i not in fixed]
        return inner.as_floats("while", kept, "leaves a loop")

    final = iter(jax.lax.while_loop(test, body, moving))
    outer.adopt(tested.events, operands, sources_of(outer, eqn), number)
    outer.adopt(notes.events, operands, sources_of(outer, eqn), number)
    return [
        operands[i] if i in fixed else next(final) for i in range(split, len(operands))
    ]


ENTER = {
    "jit": enter_jit,
    "remat": enter_remat,
    "custom": enter_custom,
    "scan": scan.enter_scan,
    "cond": enter_cond,
    "while": enter_while,
    "shard_map": sharded.enter_shard_map,
}
