"""One interpreter of jaxprs that knows which values are still parameters.

Bodies are read from equations and re-emitted through public functions (`jax.jit`,
`lax.scan`, `jax.checkpoint`, `lax.switch`, `lax.while_loop`, `jax.shard_map`), so that
the result is an ordinary JAX program. An equation that no parameter enters is bound
as it stands.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp

from qjax.core.carrier import Carrier
from qjax.core.layout import Layout
from qjax.core.qtensor import QTensor
from qjax.trace import compat
from qjax.trace.contractions import CONTRACTIONS, Call, read_call
from qjax.trace.views import LAYOUT, PLACEMENT, Joined, Tracked, View, as_array, follow

Source = tuple[Any, ...]
"""Identity of a value inside one body: equal sources are equal activations."""


@dataclass(frozen=True)
class Event:
    """A use of a parameter, as seen from the body that holds it.

    `leaf` is the number of the operand of that body through which the parameter came
    (None: no parameter, two activations met). `stacked` and `groups` grow as the event
    leaves scans: lengths, and the operands scanned together. `seen` is what the rule
    observed of the activation: a pytree with `over_steps`, or None.
    """

    leaf: Any
    kind: str
    primitive: str
    runs: str
    layout: Layout | None = None
    M: int = 0
    lead: tuple[int, ...] = ()
    source: Source = ()
    stacked: tuple[int, ...] = ()
    groups: tuple[tuple[int, ...], ...] = ()
    picks: tuple[tuple[int, int | None], ...] = ()
    index: int = 0
    seen: Any = None


Rule = Callable[[Any, Call, Tracked, list[Any], int], tuple[Any, ...]]
"""`rule(eqn, call, weight, operands, site) -> (output or None, how it runs)`, and a
third member if it observed the activation (`Event.seen`)."""


@dataclass
class Body:
    """Evaluates one jaxpr. A new one for every nested body.

    `names` maps values, by what `checkpoint_name` calls them.
    """

    rule: Rule
    enter: Mapping[str, Any]
    everything: bool = False
    names: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict)
    cache: dict[Any, Any] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    counts: dict[Any, int] = field(default_factory=dict)

    def run(
        self,
        jaxpr: Any,
        consts: Sequence[Any],
        args: Sequence[Any],
        sources: Sequence[Source] | None = None,
    ) -> list[Any]:
        """Outputs of `jaxpr`; arguments and outputs may be `Tracked` or `Joined`."""
        env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts))
        env |= dict(zip(jaxpr.invars, args))
        known = sources or [("arg", i) for i in range(len(args))]
        self.sources = dict(zip(jaxpr.invars, known))
        self.counts = {key_of(x): x.base for x in parameters_of(args)}
        for number, eqn in enumerate(jaxpr.eqns):
            operands = [v.val if compat.is_literal(v) else env[v] for v in eqn.invars]
            with compat.context(eqn):
                outputs = self.equation(eqn, operands, number)
            env |= dict(zip(eqn.outvars, outputs))
        return [v.val if compat.is_literal(v) else env[v] for v in jaxpr.outvars]

    def source(self, atom: Any) -> Source:
        """Which activation an operand is."""
        if compat.is_literal(atom):
            return ("literal", str(atom))
        return self.sources.setdefault(atom, ("value", id(atom)))

    def equation(self, eqn: Any, operands: list[Any], number: int) -> list[Any]:
        """Evaluate one equation."""
        kind = compat.kind(eqn)
        parameters = [x for x in operands if isinstance(x, (Tracked, Joined))]
        if compat.has_bodies(eqn) and (
            parameters or self.everything or self._names_inside(eqn)
        ):
            return self.enter[kind](self, eqn, operands, number)
        self._name_sources(eqn, kind, number)
        if not parameters:
            if self.everything and kind in ("dot_general", "ragged_dot_general"):
                self._activation_site(eqn)
            if kind == "name" and eqn.params["name"] in self.names:
                return [self.names[eqn.params["name"]](operands[0])]
            return compat.bind(eqn, operands)
        if kind == "concatenate":
            return [self._join(eqn, operands)]
        if kind in CONTRACTIONS and len(parameters) == 1:
            return [self._contract(eqn, operands)]
        if kind in LAYOUT and isinstance(operands[0], Tracked):
            return [self._follow(eqn, kind, operands)]
        return self._other_use(eqn, operands, f"read by {kind}")

    def _names_inside(self, eqn: Any) -> bool:
        return bool(self.names) and not compat.names_in_bodies(eqn).isdisjoint(
            self.names
        )

    def _name_sources(self, eqn: Any, kind: str, number: int) -> None:
        """Layout copies of one activation keep one identity."""
        for i, var in enumerate(eqn.outvars):
            if kind in LAYOUT and len(eqn.invars) == 1:
                seen = (kind, str(eqn.params), *self.source(eqn.invars[0]))
                self.sources[var] = seen
            else:
                self.sources[var] = ("eqn", number, i)

    def _activation_site(self, eqn: Any) -> None:
        shape = eqn.outvars[0].aval.shape
        self.events.append(
            Event(
                None,
                "activation",
                eqn.primitive.name,
                "float",
                M=shape[-2] if len(shape) > 1 else 1,
                source=self.source(eqn.invars[0]),
            )
        )

    def _join(self, eqn: Any, operands: list[Any]) -> Any:
        pieces: list[Any] = []
        for x in operands:
            same = isinstance(x, Joined) and x.axis == eqn.params["dimension"]
            pieces += x.pieces if same else (x,)
        if any(isinstance(x, Joined) for x in pieces):
            return self._other_use(eqn, operands, "joined along two axes")[0]
        return Joined(tuple(pieces), eqn.params["dimension"])

    def _follow(self, eqn: Any, kind: str, operands: list[Any]) -> Any:
        source, rest = operands[0], [as_array(x) for x in operands[1:]]
        moved = follow(eqn, kind, source, rest)
        if moved is None:
            return self._other_use(eqn, operands, f"reshaped by {kind}")[0]
        if source.quantized:
            if kind in PLACEMENT:
                # The arrays of the leaf stay where they are; that must not be silent.
                runs = f"not placed: {kind} on a quantized leaf has no effect"
                self.events.append(
                    Event(source.leaf, "other", kind, runs, picks=source.picks)
                )
            return moved
        return replace(moved, value=compat.bind(eqn, [source.value, *rest])[0])

    def _contract(self, eqn: Any, operands: list[Any]) -> Any:
        position = next(
            i for i, x in enumerate(operands) if isinstance(x, (Tracked, Joined))
        )
        weight = operands[position]
        if isinstance(weight, Joined):
            return self._contract_joined(eqn, operands, position)
        call = read_call(eqn, weight, position)
        if isinstance(call, str):
            return self._other_use(eqn, operands, call)[0]
        site = self.counts.get(key_of(weight), 0)
        self.counts[key_of(weight)] = site + 1
        output, runs, *seen = self.rule(eqn, call, weight, operands, site)
        self.events.append(
            Event(
                weight.leaf,
                call.kind,
                eqn.primitive.name,
                runs,
                layout=call.layout,
                M=call.M,
                lead=_batch_shape(weight.view, call.layout),
                source=self.source(eqn.invars[call.operand]),
                picks=weight.picks,
                index=site,
                seen=seen[0] if seen else None,
            )
        )
        if output is None:
            return compat.bind(eqn, [as_array(x) for x in operands])[0]
        return output

    def _contract_joined(self, eqn: Any, operands: list[Any], position: int) -> Any:
        """`x @ [a, b, c]` as `[x @ a, x @ b, x @ c]`; leaves keep their formats.

        Pieces that are no parameter in low bits stay as they are.
        """
        joined: Joined = operands[position]
        if eqn.primitive.name != "dot_general":
            return self._other_use(eqn, operands, "a joined parameter")[0]
        contract, batch = (tuple(d[position]) for d in eqn.params["dimension_numbers"])
        if joined.axis in contract + batch:
            return self._other_use(eqn, operands, "joined along a contracted axis")[0]
        free = [d for d in range(len(joined.shape)) if d not in contract + batch].index(
            joined.axis
        )
        if position == 0:
            axis = len(batch) + free
        else:
            other = len(eqn.invars[0].aval.shape) - len(contract)
            axis = other + free
        outputs = []
        for piece in joined.pieces:
            one = _with_piece(eqn, operands, position, piece, axis)
            given = [*operands[:position], piece, *operands[position + 1 :]]
            tracked = isinstance(piece, Tracked)
            y = self._contract(one, given) if tracked else compat.bind(one, given)[0]
            outputs.append(as_array(y))
        return jnp.concatenate(outputs, axis=axis)

    def _other_use(self, eqn: Any, operands: list[Any], reason: str) -> list[Any]:
        return compat.bind(eqn, self.as_floats(eqn.primitive.name, operands, reason))

    def as_floats(
        self, primitive: str, operands: Sequence[Any], reason: str
    ) -> list[Any]:
        """Arrays in place of parameters, each noted as another use of its leaf."""
        for x in parameters_of(operands):
            runs = f"dequantized: {reason}" if x.quantized else f"float: {reason}"
            self.events.append(Event(x.leaf, "other", primitive, runs, picks=x.picks))
        return [as_array(x) for x in operands]

    def nested(self) -> "Body":
        """An interpreter for a body inside this one."""
        return Body(self.rule, self.enter, self.everything, self.names, self.cache)

    def renumber(self, operands: Sequence[Any]) -> list[Any]:
        """Operands of a nested body: a leaf is known there by its position.

        Nothing else about the leaf enters, so that equal layers share one trace. A
        leaf that is given twice keeps its first position, since its sites are counted
        together.
        """
        numbers: dict[Any, Any] = {}

        def inside(x: Tracked, number: Any) -> Tracked:
            several = isinstance(x.value, (QTensor, Carrier)) and len(x.value.acts) > 1
            base = self.counts.get(key_of(x), 0) if several else 0
            number = numbers.setdefault(key_of(x), number)
            return replace(x, leaf=number, base=base, picks=())

        def one(x: Any, i: int) -> Any:
            if isinstance(x, Joined):
                pieces = (
                    inside(p, (i, j)) if isinstance(p, Tracked) else p
                    for j, p in enumerate(x.pieces)
                )
                return replace(x, pieces=tuple(pieces))
            return inside(x, i) if isinstance(x, Tracked) else x

        return [one(x, i) for i, x in enumerate(operands)]

    def adopt(
        self,
        events: Sequence[Event],
        operands: Sequence[Any],
        sources: Sequence[Source],
        number: int,
    ) -> None:
        """Take over the events of a nested body, renamed to this body's terms.

        `operands` are the body's as this body knows them.
        """
        offsets = dict(self.counts)
        renamed = self.renumber(operands)
        for event in events:
            source = event.source
            if source[-2:-1] == ("arg",):
                source = (*source[:-2], *sources[source[-1]])
            elif source:
                source = ("in", number, *source)
            changes: dict[str, Any] = {"source": source}
            if event.leaf is not None:
                outer, inner = (piece(x, event.leaf) for x in (operands, renamed))
                picks = outer.picks + event.picks
                key = outer.leaf, picks
                changes |= {"leaf": outer.leaf, "picks": picks}
                if event.kind != "other":
                    index = event.index - inner.base + offsets.get(key, 0)
                    self.counts[key] = max(self.counts.get(key, 0), index + 1)
                    changes["index"] = index
            groups = (tuple(piece(operands, i).leaf for i in g) for g in event.groups)
            self.events.append(replace(event, **changes, groups=tuple(groups)))


@dataclass(frozen=True)
class _Piece:
    """A dot_general on one piece of a joined parameter."""

    primitive: Any
    params: dict[str, Any]
    invars: Sequence[Any]
    outvars: Sequence[Any]


@dataclass(frozen=True)
class _Shape:
    aval: Any


def _with_piece(
    eqn: Any, operands: list[Any], position: int, piece: Any, axis: int
) -> _Piece:
    out = eqn.outvars[0].aval
    shape = list(out.shape)
    joined: Joined = operands[position]
    shape[axis] = piece.shape[joined.axis]
    invars = list(eqn.invars)
    aval = _Shape(jax.ShapeDtypeStruct(tuple(shape), out.dtype))
    return _Piece(eqn.primitive, eqn.params, invars, [aval])


def key_of(x: Tracked) -> Any:
    """Sites are counted for each leaf and, where layers are indexed, each layer."""
    return x.leaf, x.picks


def piece(operands: Sequence[Any], number: Any) -> Tracked:
    """The parameter that a nested body knows by `number`."""
    if isinstance(number, tuple):
        return operands[number[0]].pieces[number[1]]
    return operands[number]


def parameters_of(values: Sequence[Any]) -> list[Tracked]:
    """The parameters among values, joined ones one by one."""
    found: list[Tracked] = []
    for value in values:
        if isinstance(value, Joined):
            found += [p for p in value.pieces if isinstance(p, Tracked)]
        elif isinstance(value, Tracked):
            found.append(value)
    return found


def _batch_shape(view: View, layout: Layout) -> tuple[int, ...]:
    return tuple(s for s, r in zip(view.leaf_shape, layout.roles) if r == "b")
