"""Where a scale on the input of some sites can be folded into what makes that input.

`x` may be divided by `s[K]` for free if every reader of `x` is one of the sites, and if
going back from `x` one meets a leaf that multiplies its features: the gain of a norm
(`g` or `1 + g`), or the columns of a previous linear, through layout operations,
elementwise products, added biases, attention values and `max(x, 0)`, which a positive
scale passes. The map from features of `x` to channels of that leaf is found by sending
channel numbers down the same operations, so that a wrong guess cannot pass: every token
must report the same map, and every added bias must number its channels alike.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.trace import compat
from qjax.trace.segments import structure_of
from qjax.trace.stream import LeafKey, key_of
from qjax.trace.tape import Known, Meeting, Op, Tape, Weight
from qjax.trace.views import LAYOUT

COPIES = frozenset(
    {"copy", "copy_p", "optimization_barrier", "name", "reduce_precision"}
)


@dataclass(frozen=True)
class Target:
    """A leaf that takes a part of the scale.

    Attributes:
      key: the layer of the leaf.
      kind: "gain" (`g / s`), "offset gain" (`(1 + g) / s - 1`), "bias" (`b / s`) or
        "columns" (of a linear, `w[:, n] / s[n]`).
      op: the linear, for "columns".
    """

    key: LeafKey
    kind: str
    op: Any = None

    def divide(self, layer: Any, s: Any) -> Any:
        """The leaf's layer with its channels divided by `s[channels]`."""
        exact = layer.astype(jnp.float32)
        if self.kind == "columns":
            layout = self.op.call.layout
            divided = layout.from_matrix(layout.to_matrix(exact) / s)
        else:
            s = s.reshape(layer.shape)
            divided = (1 + exact) / s - 1 if self.kind == "offset gain" else exact / s
        return divided.astype(layer.dtype)


@dataclass(frozen=True)
class Fold:
    """How a scale on `x[M, K]` is folded.

    Attributes:
      targets: the leaves that take it.
      channels: for each of the K features, the channel of every target that makes it;
        several features may share one (grouped-query attention).
      count: how many channels there are.
    """

    targets: tuple[Target, ...]
    channels: Any
    count: int

    @property
    def norm(self) -> bool:
        """Whether the gain of a norm takes the scale."""
        return any("gain" in target.kind for target in self.targets)


@dataclass
class Folder:
    """Finds folds on one tape; chains of equal structure are proven once."""

    tape: Tape
    proven: dict[Any, Any] = field(default_factory=dict)

    def __post_init__(self):
        self.maker: dict[int, Op] = {}
        self.readers: dict[int, list[Op]] = {}
        self.uses: dict[LeafKey, int] = {}
        for op in self.tape.ops:
            self.maker |= dict.fromkeys(op.outs, op)
            for x in dict.fromkeys(x for x in op.ins if isinstance(x, int)):
                self.readers.setdefault(x, []).append(op)
                if x in self.tape.weights:
                    w = self.tape.weights[x]
                    key = w.leaf, w.index
                    self.uses[key] = self.uses.get(key, 0) + 1
        self.returned = {x for x in self.tape.outputs if isinstance(x, int)}
        for x in self.returned & self.tape.weights.keys():
            key = self.tape.weights[x].leaf, self.tape.weights[x].index
            self.uses[key] = self.uses.get(key, 0) + 1

    def find(self, meetings: Sequence[Meeting]) -> Fold | str:
        """The fold for sites that read one activation, or why there is none."""
        if any(m.call.kind != "dot" for m in meetings):
            return f"a {meetings[0].call.kind} site reads it"
        top = meetings[0].x
        allowed = {id(m) for m in meetings}
        found = self._back(top, allowed)
        if isinstance(found, str):
            return found
        targets, start, chain = found
        if any(self._uses(t.key) != 1 for t in targets):
            return "the leaf that makes it is used elsewhere too"
        channels = self._prove(targets[-1], start, chain, meetings[0])
        if channels is None:
            return "its features do not stand for channels of one leaf"
        return Fold(tuple(targets), channels, int(channels.max()) + 1)

    def _uses(self, key: LeafKey) -> int:
        """How many operations read a layer, or the stack that it is a layer of."""
        leaf, index = key
        return sum(
            count
            for (other, at), count in self.uses.items()
            if other == leaf and all(a == b for a, b in zip(at, index))
        )

    def _back(self, x: Any, allowed: set[int]) -> Any:
        """`(targets, value the leaf makes, operations from there to x)`."""
        if not isinstance(x, int) or x in self.returned:
            return "the function returns it"
        if any(id(op) not in allowed for op in self.readers.get(x, ())):
            return "something else reads it too"
        op = self.maker.get(x)
        if op is None:
            return "it is an input of the function"
        if isinstance(op, Meeting):
            return self._columns(op)
        name = compat.kind(op.eqn)
        if len(op.ins) == 1 and (name in LAYOUT or name in COPIES):
            return self._through(op, 0)
        side = rectified(op.eqn)
        if side is not None and isinstance(op.ins[side], int):
            return self._through(op, side)
        if name == "mul":
            return self._product(op)
        if name == "add":
            return self._bias(op)
        if name == "dot_general":
            return self._first(op, (1, 0))
        return f"it is made by {name}"

    def _through(self, op: Op, side: int) -> Any:
        found = self._back(op.ins[side], {id(op)})
        if isinstance(found, str):
            return found
        targets, start, chain = found
        return targets, start, [*chain, (op, side)]

    def _first(self, op: Op, sides: Sequence[int]) -> Any:
        """Through the first operand that leads to a leaf."""
        values = [x for x in op.ins if isinstance(x, int)]
        if len(set(values)) < len(values):
            return "it is made by multiplying a value with itself"
        reasons = []
        for side in sides:
            found = self._through(op, side)
            if not isinstance(found, str):
                return found
            reasons.append(found)
        return reasons[0]

    def _product(self, op: Op) -> Any:
        for side in (0, 1):
            target = self._gain(op.ins[side])
            if target is not None:
                return [target], op, []
        return self._first(op, (1, 0))

    def _gain(self, x: Any) -> Target | None:
        weight = self.tape.weights.get(x)
        if weight is not None:
            return Target((weight.leaf, weight.index), "gain")
        op = self.maker.get(x)
        if op is None or isinstance(op, Meeting):
            return None
        if len(op.ins) == 1 and compat.kind(op.eqn) in LAYOUT:
            return self._gain(op.ins[0]) if self._alone(op) else None
        if compat.kind(op.eqn) != "add" or not self._alone(op):
            return None
        for side in (0, 1):
            weight, other = self.tape.weights.get(op.ins[side]), op.ins[1 - side]
            one = isinstance(other, Known) and np.all(np.asarray(other.value) == 1)
            if weight is not None and one:
                return Target((weight.leaf, weight.index), "offset gain")
        return None

    def _alone(self, op: Op) -> bool:
        return all(len(self.readers.get(out, ())) == 1 for out in op.outs)

    def _bias(self, op: Op) -> Any:
        for side in (0, 1):
            weight = self.tape.weights.get(op.ins[side])
            if weight is None:
                continue
            found = self._through(op, 1 - side)
            if isinstance(found, str):
                return found
            targets, start, chain = found
            bias = Target((weight.leaf, weight.index), "bias")
            return [bias, *targets], start, chain
        return "it is a sum"

    def _columns(self, op: Meeting) -> Any:
        if op.call.kind != "dot" or "b" in op.call.layout.roles:
            return f"it is made by a {op.call.kind} with batched axes"
        return [Target(key_of(op), "columns", op)], op, []

    def _prove(self, target: Target, start: Op, chain: Any, last: Meeting) -> Any:
        key = (
            target.kind,
            structure_of(start.eqn),
            self._views(start),
            None if target.op is not None else self._way(target, start),
            tuple(
                (structure_of(op.eqn), side, _shapes(op), self._views(op))
                for op, side in chain
            ),
            structure_of(last.eqn),
            last.weight.view,
            _shapes(last),
        )
        if key not in self.proven:
            # One sequence is as good as all, but the shapes are the tape's.
            self.proven[key] = self._channels(target, start, chain, last)
        return self.proven[key]

    def _views(self, op: Op) -> Any:
        weights = self.tape.weights
        return tuple(weights[x].view if x in weights else None for x in _values(op))

    def _channels(self, target: Target, start: Op, chain: Any, last: Meeting) -> Any:
        x = self._numbered(target, start)
        if x is None:
            return None
        for op, side in chain:
            x = _send(op, side, x)
            if x is None or not self._bias_agrees(op, side, x):
                return None
        table = np.asarray(last.call.matrix(x)).reshape(-1, last.call.layout.K)
        if not (table == table[:1]).all() or not np.isfinite(table).all():
            return None
        channels = table[0].astype(np.int64)
        # Channels that are summed over on the way do not arrive.
        whole = np.unique(channels).size == _count(target, self._layer(start, target))
        return channels if whole else None

    def _bias_agrees(self, op: Op, side: int, x: Any) -> bool:
        """Whether an added bias numbers its channels as what it is added to."""
        if compat.kind(op.eqn) != "add":
            return True
        view = self.tape.weights[op.ins[1 - side]].view
        numbers = jnp.arange(np.prod(view.leaf_shape, dtype=int), dtype=jnp.float32)
        own = view.of_array(numbers.reshape(view.leaf_shape))
        return own.ndim <= x.ndim and bool((own == x).all())

    def _layer(self, start: Op, target: Target) -> Any:
        return None if target.op is not None else self._weight_of(start, target)

    def _numbered(self, target: Target, start: Op) -> Any:
        """The value that the leaf makes, with the number of its channel everywhere."""
        shape = start.eqn.outvars[0].aval.shape
        if target.kind == "columns":
            call = target.op.call
            row = jnp.arange(call.layout.N, dtype=jnp.float32)
            return call.finish(jnp.broadcast_to(row, (call.M, call.layout.N)))
        weight, way = self._operand(start, target)
        size = np.prod(weight.view.leaf_shape, dtype=int)
        numbers = jnp.arange(size, dtype=jnp.float32).reshape(weight.view.leaf_shape)
        value = weight.view.of_array(numbers)
        for op in way:
            value = _send(op, 0, value)
        if value is None or value.ndim != len(shape):
            return None
        return jnp.broadcast_to(value, shape)

    def _weight_of(self, start: Op, target: Target) -> Weight:
        return self._operand(start, target)[0]

    def _way(self, target: Target, start: Op) -> Any:
        """The structure of what makes the gain."""
        weight, way = self._operand(start, target)
        return weight.view, tuple((structure_of(op.eqn), _shapes(op)) for op in way)

    def _operand(self, start: Op, target: Target) -> tuple[Weight, list[Op]]:
        """The leaf's view, and the operations from there to the multiplication.

        There are some where a gain is `1 + g`: the sum, and what broadcasts it.
        """
        for x in start.ins:
            way: list[Op] = []
            while isinstance(x, int) and x not in self.tape.weights:
                op = self.maker.get(x)
                names = [] if op is None else [i for i in op.ins if isinstance(i, int)]
                x = names[0] if len(names) == 1 else None
                way = way if op is None else [op, *way]
            if x is not None and isinstance(x, int):
                weight = self.tape.weights[x]
                if (weight.leaf, weight.index) == target.key:
                    return weight, way
        raise ValueError("the gain is no operand of the product")


def _count(target: Target, weight: Any) -> int:
    if target.op is not None:
        return target.op.call.layout.N
    return int(np.prod(weight.view.leaf_shape, dtype=int))


def _values(op: Op) -> list[int]:
    """Operands; -1 for those whose value is written on the tape."""
    return [x if isinstance(x, int) else -1 for x in op.ins]


def rectified(eqn: Any) -> int | None:
    """Which operand `x` of `max(x, 0)`, also inside a jit or a custom derivative.

    None for every other equation.
    """
    name = compat.kind(eqn)
    if name in ("jit", "custom"):
        jaxpr, _ = compat.call_body(eqn)
        one = len(jaxpr.invars) == len(jaxpr.eqns) == len(jaxpr.outvars) == 1
        if not one or jaxpr.outvars[0] is not jaxpr.eqns[0].outvars[0]:
            return None
        return None if rectified(jaxpr.eqns[0]) is None else 0
    if name != "max":
        return None
    zero = [compat.is_literal(v) and not np.any(v.val) for v in eqn.invars]
    return zero.index(False) if sum(zero) == 1 else None


def _shapes(op: Op) -> Any:
    return tuple(tuple(v.aval.shape) for v in (*op.eqn.invars, *op.eqn.outvars))


def _send(op: Op, side: int, x: Any) -> Any:
    """Channel numbers through one operation; None where it would mix them."""
    name = compat.kind(op.eqn)
    out = op.eqn.outvars[0].aval
    if name in ("mul", "add", "max", "jit", "custom"):
        return x if x.shape == tuple(out.shape) else None
    if name == "dot_general":
        other = op.eqn.invars[1 - side].aval
        contract, _ = op.eqn.params["dimension_numbers"]
        # A matrix that takes the first of the summed positions carries numbers over.
        index = jnp.zeros(other.shape, jnp.int32)
        for d in contract[1 - side]:
            index = index + jax.lax.broadcasted_iota(jnp.int32, other.shape, d)
        pick = (index == 0).astype(jnp.float32)
        sides = (x, pick) if side == 0 else (pick, x)
        return jax.lax.dot_general(
            *sides, op.eqn.params["dimension_numbers"], precision="highest"
        )
    if name in ("convert_element_type", *COPIES, "sharding_constraint"):
        return x
    return compat.bind(op.eqn, [x])[0]


def pooled(values: Any, fold: Fold, how: Callable[..., Any]) -> Any:
    """Per-feature values `[K]` as one for each channel, spread back over the features.

    `how` is `jax.ops.segment_max` or the like.
    """
    per_channel = how(values, jnp.asarray(fold.channels), num_segments=fold.count)
    return per_channel[fold.channels]
