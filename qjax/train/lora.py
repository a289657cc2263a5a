"""LoRA (Hu et al., ICLR 2022) and QLoRA (Dettmers et al., NeurIPS 2023) as a transform.

https://arxiv.org/abs/2106.09685, https://arxiv.org/abs/2305.14314

    y = x W + s (drop(x) A) B,   s = alpha / r     (rsLoRA: alpha / sqrt(r))

`W` is frozen, in float or in low bits; `A[K, r]` starts uniform in `+-1/sqrt(K)`
(PEFT's Kaiming start), `B[r, N]` at zero. rsLoRA is https://arxiv.org/abs/2312.03732,
DoRA https://arxiv.org/abs/2402.09353. Adapters lie beside the parameters, never inside
them: a stacked leaf has stacked adapters and is not copied.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial, wraps
from math import sqrt
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.core.layout import Layout
from qjax.core.pytrees import register
from qjax.core.qtensor import QTensor, Stacked, is_quantized
from qjax.core.transforms import Diagonal
from qjax.methods.base import check_patterns, positive_integer, within
from qjax.planning import candidates_of, main_use, uses_by_path
from qjax.recipes import assign
from qjax.solving import site_key
from qjax.trace.batches import as_batch
from qjax.trace.paths import flatten_with_paths
from qjax.trace.program import require_loaded
from qjax.trace.sites import Sites, sites
from qjax.train.adapted import Adapted, adapted_rule
from qjax.train.running import check_key, layer_keys, run


@dataclass(frozen=True)
class LoRA:
    """What adapters are, and which sites get one.

    Args:
      rank: `r`; 16.
      alpha: 16, as in QLoRA.
      dropout: probability in [0, 1) that a feature of an adapter's input is dropped;
        only where `f_lora` is given a key.
      rslora: scale by `alpha / sqrt(r)`.
      dora: a learned magnitude for each output feature.
      targets: patterns of the linears to adapt; None takes all but the head, routers
        and tied embeddings.
      ignore: patterns of the linears to leave.

    Raises:
      ValueError: a field out of range.
      TypeError: a pattern is none.
    """

    rank: int = 16
    alpha: float | int = 16
    dropout: float | int = 0.0
    rslora: bool = False
    dora: bool = False
    targets: str | tuple[str, ...] | None = None
    ignore: str | tuple[str, ...] = ()

    def __post_init__(self):
        positive_integer("LoRA", "rank", self.rank)
        within("LoRA", "alpha", self.alpha, 0, np.inf)
        number = isinstance(self.dropout, (int, float))
        if not number or not 0 <= self.dropout < 1:
            raise ValueError(f"LoRA.dropout must be in [0, 1), got {self.dropout!r}")
        check_patterns("LoRA", self.targets, self.ignore)

    @property
    def scaling(self) -> float:
        """`s`."""
        return self.alpha / (sqrt(self.rank) if self.rslora else self.rank)


@dataclass(frozen=True)
class Place:
    """A leaf that is adapted.

    Attributes:
      names: what patterns see of it: its path, or one name per layer.
      layout, shape, dtype: of the leaf.
    """

    names: tuple[str, ...]
    layout: Layout
    shape: tuple[int, ...]
    dtype: Any

    @property
    def layers(self) -> tuple[int, ...]:
        """Leading axes that are layers."""
        return self.shape[: len(self.shape) - len(self.layout.roles)]

    @property
    def lead(self) -> tuple[int, ...]:
        """Leading axes of the leaf's matrix form: layers, then experts."""
        own = len(self.layers)
        return self.layers + tuple(self.shape[own + i] for i in self.layout.axes("b"))


@dataclass(frozen=True)
class Adapters:
    """The trained part. A pytree: give it to any optimiser.

    Attributes:
      leaves: by path, `a[*lead, K, r]`, `b[*lead, r, N]` and, of DoRA,
        `magnitude[*lead, N]`, all float32.
      config: static; what they are.
      places: static; the adapted leaves, by path.
      base: static; what is frozen beside them: the parameters as they are ("given"), or
        what `initialise_lora` put in their place, in float ("rest") or in "codes".
    """

    leaves: dict[str, dict[str, Any]]
    config: LoRA
    places: tuple[tuple[str, Place], ...] = field(default_factory=tuple)
    base: str = "given"


register(Adapters, ("leaves",), ("config", "places", "base"))


def lora(
    f: Callable[..., Any],
    qparams: Any,
    rank: int = 16,
    alpha: float | int = 16,
    targets: str | tuple[str, ...] | None = None,
    dropout: float | int = 0.0,
    *,
    example: Any,
    key: Any,
    **options: Any,
) -> tuple[Callable[..., Any], Adapters]:
    """`f` with trained low-rank terms beside frozen weights.

    `f_lora(adapters, qparams, *inputs, key=None) -> out` is an ordinary JAX function;
    differentiate it with respect to `adapters`. At the start `out` is
    `apply(f)(qparams, *inputs)`.

    Quantized leaves run as in `apply`, but codes are decoded a few columns at a time,
    and again in the backward pass, which keeps none: no pass makes a float array of a
    whole quantized weight, DoRA's norm included. Exceptions: a leaf with outliers `S`
    (`explain` shows it), one that is read along other axes than those of its codes,
    which is merged (`QuantizationWarning`), DoRA's norm of a leaf with a transform, and
    narrow weights on a GPU unless compiled with `qjax.ops.GPU_COMPILER_OPTIONS`.

    Args:
      f: `f(params, *inputs)`.
      qparams: parameters, of which some may be quantized (QLoRA:
        `quantize(f, params, RTN("NF4_DQ"), ...)`).
      rank, alpha, targets, dropout: as in `LoRA`.
      example: one batch `inputs` to trace with; `jax.ShapeDtypeStruct`s will do.
      key: for the start of `A`.
      **options: `rslora`, `dora` and `ignore`, as in `LoRA`.

    Returns:
      `f_lora` and the adapters.

    Raises:
      ValueError: a field out of range, a pattern that matches no linear, or a leaf that
        cannot be adapted.
      TypeError: `key` is no key, `example` no tuple, or a leaf is still on disk.
    """
    config = LoRA(rank, alpha, dropout, targets=targets, **options)
    check_key("lora", key)
    require_loaded(qparams)
    leaves = dict(flatten_with_paths(qparams))
    places = _places(config, sites(f, qparams, *as_batch(example, "example")), leaves)
    factors = {
        path: _initial(config, place, leaves[path], site_key(key, path))
        for path, place in places
    }
    return _transformed(f), Adapters(factors, config, places)


def _places(
    config: LoRA, found: Sites, leaves: dict[str, Any]
) -> tuple[tuple[str, Place], ...]:
    linear = {"dot", "ragged_dot"}
    by_path = {
        path: uses
        for path, uses in uses_by_path(found).items()
        if {use.kind for use in uses} <= linear
    }
    candidates = candidates_of(found, by_path)
    assigned = assign([config], candidates)
    chosen = [c for c in candidates if 0 in assigned[c.path]]
    return tuple(
        (c.path, _place(config, c, by_path[c.path], leaves, assigned[c.path]))
        for c in chosen
    )


def _place(
    config: LoRA,
    candidate: Any,
    uses: Any,
    leaves: dict[str, Any],
    assigned: tuple[int | None, ...],
) -> Place:
    path, leaf = candidate.path, leaves[candidate.path]
    if None in assigned:
        left = candidate.names[assigned.index(None)]
        raise ValueError(
            f"{path} is one stacked leaf, so that {left} cannot go without an adapter "
            "while other layers have one; do not stack the layers, or adapt all"
        )
    if isinstance(leaf, Stacked):
        raise ValueError(
            f"the layers of {path} have several formats; adapters need one format for "
            "each stacked leaf"
        )
    layout = main_use(uses).layout
    if isinstance(leaf, QTensor):
        layout = leaf.settled().layout
    assert layout is not None  # `uses_by_path` has no others
    if config.dora and any(use.kind == "ragged_dot" for use in uses):
        raise ValueError(
            f"LoRA.dora is True, but {path} holds experts, which have no magnitude; "
            "leave it out with ignore"
        )
    return Place(candidate.names, layout, tuple(leaf.shape), jnp.dtype(leaf.dtype))


def _initial(config: LoRA, place: Place, leaf: Any, key: Any) -> dict[str, Any]:
    K, N = place.layout.K, place.layout.N
    limit = 1 / sqrt(K)
    shape = (*place.lead, K, config.rank)
    a = jax.random.uniform(key, shape, jnp.float32, -limit, limit)
    factors = {"a": a, "b": jnp.zeros((*place.lead, config.rank, N), jnp.float32)}
    if config.dora:
        alone = adapted(config, place, factors, leaf)
        factors["magnitude"] = jax.jit(Adapted.norm)(alone)
    return factors


def adapted(
    config: LoRA, place: Place, factors: dict[str, Any], leaf: Any, key: Any = None
) -> Adapted:
    """A leaf with its adapter."""
    return Adapted(
        leaf,
        factors["a"],
        factors["b"],
        factors.get("magnitude"),
        key,
        place.layout,
        place.dtype,
        config.scaling,
        float(config.dropout),
    )


def _transformed(f: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(f)
    def f_lora(
        adapters: Adapters, qparams: Any, *inputs: Any, key: Any = None, **options: Any
    ) -> Any:
        config = adapters.config

        def make(path: str, place: Place, leaf: Any) -> Adapted:
            keys = None
            if key is not None and config.dropout:
                keys = layer_keys(key, path, place.layers)
            return adapted(config, place, adapters.leaves[path], leaf, keys)

        makes = {path: partial(make, path, place) for path, place in adapters.places}
        return run(f, qparams, makes, adapted_rule, inputs, options)[0]

    return f_lora


def merge_lora(qparams: Any, adapters: Adapters, into: str = "float") -> Any:
    """The parameters with the adapters in them, for `apply(f)` or `f` itself.

    Args:
      qparams: the frozen parameters.
      adapters: as trained.
      into: "float": adapted leaves become float arrays of the leaf's dtype, ready to be
        quantized again; "low_rank": quantized leaves stay so and get the factors beside
        their codes (float leaves become float arrays).

    Raises:
      ValueError: `into` is unknown, a quantized leaf with a transform or experts takes
        no low rank, or one with a correction bias becomes no float array.
    """
    if into not in ("float", "low_rank"):
        raise ValueError(f'into is {into!r}; it must be "float" or "low_rank"')
    leaves = dict(flatten_with_paths(qparams))
    for path, place in adapters.places:
        leaf = adapted(adapters.config, place, adapters.leaves[path], leaves[path])
        beside = into == "low_rank" and isinstance(leaves[path], QTensor)
        leaves[path] = _beside(path, leaf) if beside else _floats(path, leaf)
    treedef = jax.tree.structure(qparams, is_leaf=is_quantized)
    return jax.tree.unflatten(treedef, leaves.values())


def _floats(path: str, leaf: Adapted) -> jax.Array:
    if isinstance(leaf.base, QTensor) and leaf.base.bias is not None:
        raise ValueError(
            f"{path} has a correction bias, for which a float array has no place; "
            'merge it with into="low_rank", or train beside weights without one'
        )
    return jax.jit(Adapted.dequantize)(leaf)


def _beside(path: str, leaf: Adapted) -> QTensor:
    """The quantized leaf with `s A` and `B` as its low rank."""
    base = leaf.base
    if base.moved or base.left is not None or leaf.layout.batch_axes:
        raise ValueError(
            f"{path} has a transform, a low rank or experts already; merge it with "
            'into="float" and quantize it again'
        )
    left = leaf.a * jnp.float32(leaf.scaling)
    if leaf.magnitude is None:
        return replace(base, left=left, right=leaf.b)
    gain = Diagonal(jax.jit(Adapted.gain)(leaf))
    acts = tuple(replace(a, t_out=gain) for a in base.acts or (base.site(0),))
    return replace(base, left=left, right=leaf.b, acts=acts)
