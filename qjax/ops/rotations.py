"""Transforms of a site's input, Hadamard's on a kernel where there is one."""

from functools import partial
from typing import Any

import jax

from qjax.core.hadamard import small_factor, small_hadamard
from qjax.core.transforms import Chain, Hadamard
from qjax.ops.kernels import Choice, unfit_target
from qjax.ops.targets import Target
from qjax_kernels.hadamard import pallas_tpu


def rotation_choice(
    transform: Any, x: Any, implementation: str, target: Target
) -> Choice | None:
    """How the Hadamard transform in `transform` runs; None where there is none.

    XLA runs every transform, so that "pallas" is no demand on them.
    """
    if _hadamard(transform) is None:
        return None
    if implementation == "xla":
        return Choice("xla", refused="XLA was asked for")
    why = _unfit(_hadamard(transform), x, target)
    return Choice("xla", refused=why) if why else Choice("pallas", target.generation)


def _hadamard(transform: Any) -> Hadamard | None:
    each = transform.transforms if isinstance(transform, Chain) else (transform,)
    return next((t for t in each if isinstance(t, Hadamard)), None)


def _unfit(transform: Hadamard | None, x: Any, target: Target) -> str:
    assert transform is not None
    why = unfit_target(target)
    if why:
        return why
    if x.ndim != 2 or transform.signs.ndim != 1:
        return "the weight has leading axes"
    factor = small_hadamard(small_factor(x.shape[1]))
    return pallas_tpu.unfit(str(target.generation), x, factor)


def turned(x: Any, transform: Any, generation: str | None) -> Any:
    """`x @ T`; with a generation, Hadamard transforms run on its kernel."""
    if generation is None:
        return transform(x)
    if isinstance(transform, Chain):
        for each in transform.transforms:
            x = turned(x, each, generation)
        return x
    if isinstance(transform, Hadamard):
        return _rotated(x, transform, generation)
    return transform(x)


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _rotated(x: Any, transform: Hadamard, generation: str) -> Any:
    """On the kernel; the gradient is that of XLA's form."""
    factor = small_hadamard(small_factor(x.shape[1]))
    return pallas_tpu.hadamard(x, transform.signs, generation=generation, factor=factor)


@_rotated.defjvp
def _rotated_jvp(generation: str, primals: Any, tangents: Any) -> Any:
    def values(x: Any, transform: Hadamard) -> Any:
        return transform(x)

    return _rotated(*primals, generation), jax.jvp(values, primals, tangents)[1]
