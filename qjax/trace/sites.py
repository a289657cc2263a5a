"""`sites`: every place where a parameter meets an activation, and what it missed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from rich.table import Table

from qjax.core.layout import Layout
from qjax.core.qtensor import is_quantized
from qjax.trace import report
from qjax.trace.apply import low_bit
from qjax.trace.control import interpreter
from qjax.trace.interpret import Event, Rule
from qjax.trace.paths import layer_names
from qjax.trace.program import Program, trace


@dataclass(frozen=True)
class Site:
    """One contraction of a leaf with an activation, `x[M, K] @ w[K, N]`.

    Attributes:
      path: the leaf, `layers/3/attn/q_proj/kernel`; empty where two activations meet.
      names: what patterns see: the path, or one name per layer of a stacked leaf.
      kind: "dot", "conv", "ragged_dot", "embedding" or "activation" (no leaf).
      layout: roles of the leaf's trailing axes here.
      stacked: lengths of the leaf's leading axes that are scanned or indexed over.
      K, N, M: inputs, outputs and tokens of one call in the traced example.
      experts: batched axes of the leaf.
      input: sites with the same number read the same activation.
      index: position among the leaf's sites, in program order.
      runs: "float", "low-bit: ..." or "dequantized: <why>".
    """

    path: str
    names: tuple[str, ...]
    kind: str
    layout: Layout | None
    stacked: tuple[int, ...]
    K: int
    N: int
    M: int
    experts: tuple[int, ...]
    input: int
    index: int
    runs: str


@dataclass(frozen=True)
class OtherUse:
    """A use of a leaf that is no site: the primitive that reads it, and why."""

    path: str
    primitive: str
    reason: str


@dataclass(frozen=True)
class Constant:
    """An array that the function captured: it has no path and is never quantized."""

    shape: tuple[int, ...]
    dtype: str
    nbytes: int


@dataclass(frozen=True)
class Sites:
    """Every use of every leaf.

    Attributes:
      sites: in program order.
      other_uses: uses that are no sites.
      constants: arrays captured by closure.
      unused: leaves that nothing reads.
      head: path of the model's output head, if `f` declares one.
      routers: paths of leaves that choose experts, if `f` declares them.
      shapes: shape of every leaf, by path.
    """

    sites: tuple[Site, ...]
    other_uses: tuple[OtherUse, ...]
    constants: tuple[Constant, ...]
    unused: tuple[str, ...]
    head: str | None
    routers: tuple[str, ...]
    shapes: dict[str, tuple[int, ...]]

    def of(self, path: str) -> tuple[Site, ...]:
        """The sites of one leaf."""
        return tuple(s for s in self.sites if s.path == path)

    def table(self) -> Table:
        """The coverage table, for a terminal."""
        return report.table(self)

    @property
    def weights(self) -> tuple[Site, ...]:
        """The sites that have a leaf."""
        return tuple(s for s in self.sites if s.kind != "activation")


def sites(f: Callable[..., Any], params: Any, *example: Any, **options: Any) -> Sites:
    """Trace `f(params, *example)` and list every use of every leaf of `params`.

    Nothing is computed: parameters and inputs may be arrays, `ShapeDtypeStruct`s,
    QTensors or lazy leaves.

    >>> from jax.numpy import ones
    >>> found = sites(lambda p, x: x @ p["w"], {"w": ones((4, 3))}, ones((2, 4)))
    >>> [(s.path, s.kind, s.K, s.N, s.M) for s in found.sites]
    [('w', 'dot', 4, 3, 2)]
    """
    program = trace(f, params, example, options)
    return sites_of(f, program, low_bit)


def sites_of(f: Callable[..., Any], program: Program, rule: Rule) -> Sites:
    """Every use of every leaf, as `rule` runs it."""
    events = _events(program, rule)
    return Sites(
        sites=_sites(program, events),
        other_uses=_other_uses(program, events),
        constants=_constants(program),
        unused=_unused(program, events),
        head=getattr(f, "head", None),
        routers=tuple(getattr(f, "routers", ())),
        shapes={p: tuple(x.shape) for p, x in zip(program.paths, program.leaves)},
    )


def _events(program: Program, rule: Rule) -> list[Event]:
    """Run the interpreter on shapes; every leaf is followed."""
    body = interpreter(rule, everything=True)

    def shape(x: Any) -> Any:
        return jax.ShapeDtypeStruct(tuple(x.shape), x.dtype)

    leaves = [
        jax.tree.map(shape, x) if is_quantized(x) else shape(x) for x in program.leaves
    ]

    def run(leaves: list[Any], inputs: list[Any]) -> list[Any]:
        like = Program(
            program.jaxpr, program.consts, program.paths, tuple(leaves), tuple(inputs),
            program.out_tree,
        )  # fmt: skip
        out = body.run(program.jaxpr, program.consts, like.operands(lambda _: True))
        return body.as_floats("return", out, "returned by the function")

    jax.eval_shape(run, leaves, list(program.inputs))
    return body.events


def _sites(program: Program, events: Sequence[Event]) -> tuple[Site, ...]:
    numbers: dict[Any, int] = {}
    found = []
    for event in events:
        if event.kind == "other":
            continue
        number = numbers.setdefault(event.source, len(numbers))
        path = "" if event.leaf is None else program.paths[event.leaf]
        layout = event.layout
        found.append(
            Site(
                path=path,
                names=_names(program, event, path),
                kind=event.kind,
                layout=layout,
                stacked=event.stacked or tuple(n for n, _ in event.picks),
                K=layout.K if layout else 0,
                N=layout.N if layout else 0,
                M=event.M,
                experts=event.lead,
                input=number,
                index=event.index,
                runs=event.runs,
            )
        )
    return tuple(found)


def _names(program: Program, event: Event, path: str) -> tuple[str, ...]:
    if event.leaf is None:
        return ()
    if event.stacked:
        groups = [[program.paths[i] for i in group] for group in event.groups]
        return layer_names(path, event.stacked, groups)
    if not event.picks:
        return (path,)
    stack = _siblings(program, path, event.picks[0][0])
    names = layer_names(path, [n for n, _ in event.picks], [stack])
    known = [index for _, index in event.picks]
    return (names[known[0]],) if len(known) == 1 and known[0] is not None else names


def _siblings(program: Program, path: str, length: int) -> list[str]:
    """Leaves under the same root with the same leading axis: stacked together."""
    root = path.split("/")[0]
    return [
        other
        for other, leaf in zip(program.paths, program.leaves)
        if other.split("/")[0] == root and tuple(leaf.shape)[:1] == (length,)
    ]


def _other_uses(program: Program, events: Sequence[Event]) -> tuple[OtherUse, ...]:
    uses = {
        OtherUse(program.paths[e.leaf], e.primitive, e.runs): None
        for e in events
        if e.kind == "other"
    }
    return tuple(uses)


def _constants(program: Program) -> tuple[Constant, ...]:
    return tuple(
        Constant(tuple(c.shape), str(c.dtype), c.size * c.dtype.itemsize)
        for c in program.consts
        if hasattr(c, "shape") and c.size > 1
    )


def _unused(program: Program, events: Sequence[Event]) -> tuple[str, ...]:
    read = {e.leaf for e in events}
    return tuple(p for i, p in enumerate(program.paths) if i not in read)
