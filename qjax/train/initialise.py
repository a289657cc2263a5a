"""Starts of adapters that make up for what quantization loses."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from math import prod
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from qjax.core.coded import Coded
from qjax.core.qtensor import QTensor, SiteActs, is_quantized
from qjax.observe import observe
from qjax.trace.paths import flatten_with_paths
from qjax.train.lora import Adapters, Place


@runtime_checkable
class Start(Protocol):
    """What splits a weight into a frozen part and factors: a frozen dataclass.

    Attributes:
      statistic: what it must know of the site's input; None: nothing.
    """

    @property
    def statistic(self) -> Any:
        """See above."""
        ...

    def split(self, w: Any, rank: int, known: Any) -> tuple[Any, Any, Any]:
        """`base`, `L[K, r]`, `R[r, N]` with `base + L R` near to `w[K, N]`.

        `base` is `Coded`, or an array that stays float.
        """
        ...


def initialise_lora(
    f: Callable[..., Any],
    params: Any,
    adapters: Adapters,
    start: Start,
    calibration: Iterable[tuple[Any, ...]] | None = None,
) -> tuple[Adapters, Any]:
    """Adapters and frozen parameters that together start near the float model.

    Args:
      f: `f(params, *inputs)`.
      params: the float parameters.
      adapters: as `lora` made them, for the float or the quantized parameters.
      start: `LoftQ`, `PiSSA`, `LQER` or `QERA`; activations that it codes are coded
        where they meet the frozen part.
      calibration: batches, each a tuple `inputs`, for starts that weigh the error by
        activations.

    Returns:
      The adapters, and the parameters with the adapted leaves replaced by what is
      frozen beside them.

    Raises:
      ValueError: an adapted leaf is not float, calibration is missing or does not
        reach a site, the start has a static activation range, or DoRA, whose
        magnitudes belong to the weights that were there before.
    """
    if adapters.config.dora:
        raise ValueError("LoRA.dora is True; DoRA starts from the weights as they are")
    record = _record(start)
    known = _known(f, params, start, calibration)
    _check_reached(adapters, start, known)
    leaves = dict(flatten_with_paths(params))
    factors = dict(adapters.leaves)
    for path, place in adapters.places:
        if is_quantized(leaves[path]):
            raise ValueError(f"{path} is quantized already; give the float parameters")
        stats = _stacked(place, known)
        base, factors[path] = _split(start, adapters, place, leaves[path], stats)
        leaves[path] = replace(base, acts=record) if is_quantized(base) else base
    coded = any(is_quantized(leaves[path]) for path, _ in adapters.places)
    own = replace(adapters, leaves=factors, base="codes" if coded else "rest")
    treedef = jax.tree.structure(params, is_leaf=is_quantized)
    return own, jax.tree.unflatten(treedef, leaves.values())


def _record(start: Start) -> tuple[SiteActs, ...]:
    """How the input of the frozen part is coded; the adapters take the input itself."""
    activation = getattr(start, "activation", None)
    if activation is None:
        return ()
    if not activation.dynamic:
        raise ValueError(
            f"{type(start).__name__} codes inputs in {activation.format.name} with a "
            "static range, and a start of adapters calibrates none; take a dynamic one "
            'such as "W8A8"'
        )
    return (SiteActs(activation=activation),)


def _known(f: Any, params: Any, start: Start, calibration: Any) -> dict[str, Any]:
    if start.statistic is None:
        return {}
    if calibration is None:
        raise ValueError(
            f"{type(start).__name__} weighs the error by activations: give "
            "calibration=[(inputs, ...), ...]"
        )
    return observe(f, params, calibration, start.statistic)


def _check_reached(adapters: Adapters, start: Start, known: dict[str, Any]) -> None:
    needed = [name for _, place in adapters.places for name in place.names]
    missing = [name for name in needed if name not in known]
    if start.statistic is not None and missing:
        raise ValueError(
            f"no batch of calibration reaches {missing[0]}, whose error "
            f"{type(start).__name__} weighs by activations; leave it out with ignore, "
            "or give batches that reach it"
        )


def _stacked(place: Place, known: dict[str, Any]) -> Any:
    """What is known of each slice's input, `[slices, ...]`."""
    if not known:
        return None
    of = [jnp.asarray(known[name]) for name in place.names]
    experts = place.lead[len(place.layers) :]
    flat = [x.reshape(prod(experts), *x.shape[len(experts) :]) for x in of]
    return jnp.concatenate(flat)


def _split(
    start: Start, adapters: Adapters, place: Place, leaf: Any, stats: Any
) -> tuple[Any, dict[str, Any]]:
    """The frozen leaf and its factors, slice by slice."""
    rank = adapters.config.rank
    matrix = place.layout.to_matrix(jnp.asarray(leaf)).astype(jnp.float32)

    @jax.jit
    def each(w: Any, stats: Any) -> Any:
        return jax.lax.map(lambda one: start.split(one[0], rank, one[1]), (w, stats))

    slices = matrix.reshape(-1, *matrix.shape[-2:])
    solved = each(slices, stats)
    base, left, right = jax.tree.map(
        lambda x: x.reshape(*place.lead, *x.shape[1:]), solved
    )
    root = np.float32(adapters.config.scaling**-0.5)
    factors = {"a": left * root, "b": right * root}
    if isinstance(base, Coded):
        return QTensor.of(base, place.layout, place.dtype), factors
    return place.layout.from_matrix(base).astype(place.dtype), factors
