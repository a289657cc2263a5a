"""Training of the scales alone (EfficientQAT's E2E-QP, Chen et al., ACL 2025).

https://arxiv.org/abs/2407.11062, section 3.3. Codes and zero points of a quantized
model stay as they are; the scales, which are few, are trained end to end on any loss:

    trained = qjax.scales_of(qparams)
    loss = lambda trained: cross_entropy(
        qjax.apply(f)(qjax.with_scales(qparams, trained), tokens), tokens
    )

with any optax optimiser (the paper: AdamW, 2e-5 at 2 bits and 1e-5 above).
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from qjax.core.coded import Coded
from qjax.core.qtensor import QTensor, Stacked, is_quantized
from qjax.trace.paths import flatten_with_paths

Scales = dict[str, list[Any]]
"""By path, the scales of every coded part of a leaf, in float32."""


def scales_of(qparams: Any) -> Scales:
    """The scales of all quantized leaves, as what is trained.

    Args:
      qparams: a tree with `QTensor`s, whose scales are floats (not double-quantized,
        not powers of two).

    Raises:
      ValueError: nothing is quantized, or a leaf whose scales are no floats.
    """
    found: Scales = {}
    for path, leaf in flatten_with_paths(qparams):
        if is_quantized(leaf):
            found[path] = [_float(path, part.scale) for part in _parts(leaf)]
    if not found:
        raise ValueError("no leaf is quantized; give what quantize returned")
    return found


def with_scales(qparams: Any, scales: Scales) -> Any:
    """The tree with the scales in place of its own; differentiable in them."""
    leaves = dict(flatten_with_paths(qparams))
    for path, values in scales.items():
        leaves[path] = _mapped(leaves[path], partial(_held, iter(values)))
    treedef = jax.tree.structure(qparams, is_leaf=is_quantized)
    return jax.tree.unflatten(treedef, leaves.values())


def _parts(leaf: QTensor | Stacked) -> list[Coded]:
    runs = leaf.parts if isinstance(leaf, Stacked) else (leaf,)
    return [part for run in runs for part in run.parts]


def _mapped(leaf: QTensor | Stacked, change: Callable[[Coded], Coded]) -> Any:
    if isinstance(leaf, Stacked):
        return replace(leaf, parts=tuple(_mapped(run, change) for run in leaf.parts))
    return replace(leaf, parts=tuple(change(part) for part in leaf.parts))


def _held(scales: Iterator[Any], part: Coded) -> Coded:
    return replace(part, scale=next(scales).astype(part.scale.dtype))


def _float(path: str, scale: Any) -> Any:
    wide = getattr(scale, "dtype", None) in (jnp.float32, jnp.bfloat16, jnp.float16)
    if not wide:
        raise ValueError(
            f"{path} has scales of {getattr(scale, 'dtype', type(scale).__name__)}, "
            "which cannot be trained; take a format with float scales, such as Int(4)"
        )
    return scale.astype(jnp.float32)
