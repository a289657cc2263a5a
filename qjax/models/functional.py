"""Modules as pairs of a pure function and a pytree of parameters."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen
import jax
import numpy as np
from flax import nnx


@dataclasses.dataclass(frozen=True, eq=False)
class Function:
    """`f(params, *inputs)`, a module's call without its parameters.

    Attributes:
      call: the pure function.
      head: the path of the output head's leaf, None where the head is tied or unknown.
      routers: the paths of leaves that choose experts; recipes leave them in float.
      init_cache: `(batch, length, dtype) -> cache`, None where the module has no cache.
      with_coded_cache: makes the function whose parameters hold scales for keys and
        values too; None where the model has none.
    """

    call: Callable[..., Any]
    head: str | None = None
    routers: tuple[str, ...] = ()
    init_cache: Callable[[int, int, Any], Any] | None = None
    with_coded_cache: "Callable[[], Function] | None" = None

    def __call__(self, params: Any, *inputs: Any, **named: Any) -> Any:
        """The module's output on `inputs` with these parameters."""
        return self.call(params, *inputs, **named)


def functional(
    model: Any, variables: Any = None, *, method: str = "__call__"
) -> tuple[Function, Any]:
    """A module as `(f, params)` with `f(params, *inputs)` pure.

    Args:
      model: a Flax NNX, Linen or Equinox module. NNX and Linen parameters become nested
        dicts, `params["layers"]["3"]["kernel"]`; Equinox parameters keep their module,
        with None for what is not an array.
      variables: what Linen's `init` returned; other modules hold their own.
      method: the method of the module that `f` calls.

    Returns:
      The function and its parameters. State that is no parameter (batch statistics,
      random streams) stays as it is in the function, and changes to it are dropped.

    Raises:
      TypeError: the module is of no known library, or `variables` does not fit it.
    """
    if isinstance(model, flax.linen.Module):
        return _from_linen(model, variables, method)
    if variables is not None:
        raise TypeError(
            f"variables are for Linen modules only, {type(model).__name__} is none"
        )
    if isinstance(model, nnx.Module):
        return _from_nnx(model, method)
    if any(base.__module__.startswith("equinox.") for base in type(model).__mro__):
        return _from_equinox(model, method)
    raise TypeError(
        f"cannot take the parameters out of {type(model).__name__}: expected a Flax "
        "NNX, Linen or Equinox module, or bring your own pair of function and "
        "parameters"
    )


def _from_nnx(model: nnx.Module, method: str) -> tuple[Function, Any]:
    graph, state, rest = nnx.split(model, nnx.Param, ...)
    leaves, tree = jax.tree.flatten(state)
    # Only the structure is kept: a function must not hold the parameters.
    numbered = nnx.to_flat_state(jax.tree.unflatten(tree, range(len(leaves))))
    paths = [tuple(str(part) for part in path) for path, _ in numbered]
    order = [variable.get_value() for _, variable in numbered]
    by_leaf = [paths[order.index(i)] for i in range(len(leaves))]

    def call(params, *inputs, **named):
        found = [_at(params, path) for path in by_leaf]
        module = nnx.merge(graph, jax.tree.unflatten(tree, found), rest)
        return getattr(module, method)(*inputs, **named)

    params = _nest(paths, [leaves[i] for i in order])
    head = "lm_head/kernel" if ("lm_head", "kernel") in paths else None
    routers = tuple("/".join(path) for path in paths if "router" in path)
    return Function(call, head, routers, _cache_maker(model)), params


def _cache_maker(model: Any) -> Callable[[int, int, Any], Any] | None:
    if not hasattr(model, "init_cache"):
        return None
    # A module without arrays: a cache depends on the configuration alone.
    graph, state = nnx.split(model)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)

    def init_cache(batch: int, length: int, dtype: Any) -> Any:
        return nnx.merge(graph, shapes).init_cache(batch, length, dtype)

    return init_cache


def _from_linen(
    model: flax.linen.Module, variables: Any, method: str
) -> tuple[Function, Any]:
    if not isinstance(variables, Mapping) or "params" not in variables:
        raise TypeError(
            "a Linen module needs its variables, what init returned, with 'params' in "
            "them"
        )
    rest = {name: each for name, each in variables.items() if name != "params"}

    def call(params, *inputs, **named):
        return model.apply({**rest, "params": params}, *inputs, method=method, **named)

    return Function(call), variables["params"]


def _from_equinox(model: Any, method: str) -> tuple[Function, Any]:
    leaves, tree = jax.tree.flatten(model)
    is_array = [isinstance(leaf, (jax.Array, np.ndarray)) for leaf in leaves]
    static = [None if array else leaf for leaf, array in zip(leaves, is_array)]

    def call(params, *inputs, **named):
        arrays = iter(jax.tree.leaves(params))
        filled = [next(arrays) if a else leaf for leaf, a in zip(static, is_array)]
        return getattr(jax.tree.unflatten(tree, filled), method)(*inputs, **named)

    params = [leaf if array else None for leaf, array in zip(leaves, is_array)]
    return Function(call), jax.tree.unflatten(tree, params)


def _at(tree: Any, path: tuple[str, ...]) -> Any:
    for part in path:
        tree = tree[part]
    return tree


def _nest(paths: list[tuple[str, ...]], leaves: list[Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, leaf in zip(paths, leaves, strict=True):
        node = tree
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = leaf
    return tree
