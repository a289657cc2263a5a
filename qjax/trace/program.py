"""A function traced once, with its parameters known by path."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from qjax.core.lazy import LazyLeaf
from qjax.core.qtensor import QTensor, is_quantized
from qjax.trace.paths import flatten_with_paths
from qjax.trace.views import Tracked, View


@dataclass(frozen=True)
class Program:
    """The jaxpr of `f(params, *inputs)`; its first arguments are the leaves."""

    jaxpr: Any
    consts: Sequence[Any]
    paths: tuple[str, ...]
    leaves: tuple[Any, ...]
    inputs: tuple[Any, ...]
    out_tree: Any

    def operands(self, track: Callable[[Any], bool]) -> list[Any]:
        """Arguments for the interpreter; the leaves that `track` names are followed."""
        leaves = [
            Tracked(x, View.of(tuple(x.shape)), i, jnp.dtype(x.dtype))
            if track(x)
            else x
            for i, x in enumerate(self.leaves)
        ]
        return [*leaves, *self.inputs]


def require_loaded(params: Any) -> None:
    """Every leaf is in memory.

    Raises:
        TypeError: a leaf is still on disk (`LazyLeaf`).
    """
    for path, leaf in flatten_with_paths(params):
        if isinstance(leaf, LazyLeaf):
            raise TypeError(
                f"{path} is still on disk (LazyLeaf); quantize it or call its read()"
            )


def trace(
    f: Callable[..., Any],
    params: Any,
    inputs: Sequence[Any],
    options: dict[str, Any] | None = None,
) -> Program:
    """Trace `f` on arrays or shapes.

    Quantized and lazy leaves are traced as `ShapeDtypeStruct`s of the float leaf, so
    that `f` never sees them. `inputs` may be arrays, tracers, shapes or nested
    containers of them; what is no array (numbers, strings) is given to `f` as it is.

    Raises:
        ValueError: two leaves have the same path.
    """
    named = [(path, _settled(x)) for path, x in flatten_with_paths(params)]
    _check_paths([path for path, _ in named])
    tree = jax.tree.structure(params, is_leaf=is_quantized)
    flat, input_tree = jax.tree.flatten((tuple(inputs), options or {}))
    moving = [i for i, x in enumerate(flat) if is_arraylike(x)]
    out: dict[str, Any] = {}

    def run(leaves: list[Any], arrays: list[Any]) -> list[Any]:
        given = list(flat)
        for i, x in zip(moving, arrays):
            given[i] = x
        args, named_args = jax.tree.unflatten(input_tree, given)
        result = f(jax.tree.unflatten(tree, leaves), *args, **named_args)
        values, out["tree"] = jax.tree.flatten(result)
        return values

    shapes = [abstract(x) for _, x in named]
    arrays = [flat[i] for i in moving]
    closed = jax.make_jaxpr(run)(shapes, arrays)
    paths, leaves = zip(*named) if named else ((), ())
    return Program(
        closed.jaxpr,
        closed.consts,
        tuple(paths),
        tuple(leaves),
        tuple(arrays),
        out["tree"],
    )


def _settled(leaf: Any) -> Any:
    if isinstance(leaf, QTensor):
        return leaf.settled()
    return leaf if hasattr(leaf, "shape") else jnp.asarray(leaf)


def _check_paths(paths: Sequence[str]) -> None:
    twice = [path for path, count in Counter(paths).items() if count > 1]
    if twice:
        raise ValueError(
            f"two leaves of the parameters have the path {twice[0]!r}; their keys must "
            "differ as text"
        )


def is_arraylike(x: Any) -> bool:
    """Whether a value is an array or the shape of one."""
    return hasattr(x, "shape") and hasattr(x, "dtype")


def abstract(leaf: Any) -> Any:
    """A leaf as the traced function sees it."""
    if is_quantized(leaf) or isinstance(leaf, LazyLeaf):
        return jax.ShapeDtypeStruct(tuple(leaf.shape), leaf.dtype)
    return leaf
