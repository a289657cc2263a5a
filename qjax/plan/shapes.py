"""Quantized parameters as shapes: what `qjax.quantize` would make, never computed."""

from math import prod
from typing import Any

import jax
import jax.numpy as jnp

from qjax.core.qtensor import QTensor
from qjax.methods.base import Solution
from qjax.methods.rtn import RTN
from qjax.planning import plan
from qjax.recipes import steps_of
from qjax.solving import Job, Solved, tensor_of
from qjax.trace.paths import flatten_with_paths
from qjax.trace.sites import sites

EXAMPLE = (jax.ShapeDtypeStruct((1, 16), jnp.int32),)


def quantized_shapes(f: Any, params: Any, scheme: str) -> Any:
    """`params` with the leaves that `RTN(scheme)` takes as QTensors of shapes.

    Every data-free or calibrated method of one scheme stores the same arrays, so this
    is what GPTQ or HQQ of that scheme need too.

    Args:
      f: `f(params, tokens)`.
      params: shapes.
      scheme: a name out of `qjax.schemes`.
    """
    steps = steps_of(RTN(scheme))
    leaves = dict(flatten_with_paths(params))
    for job in plan(steps, sites(f, params, *EXAMPLE), leaves):
        leaves[job.path] = _qtensor(job, steps[0])
    return jax.tree.unflatten(jax.tree.structure(params), leaves.values())


def _qtensor(job: Job, method: Any) -> QTensor:
    own = len(job.shape) - len(job.layout.roles)
    lead = (*job.shape[:own], *job.experts)
    assert prod(lead) == job.slices
    whole = jax.ShapeDtypeStruct((*lead, job.layout.K, job.layout.N), job.dtype)
    solved = jax.eval_shape(lambda w: Solved(Solution(method.solve(w))), whole)
    return tensor_of(solved, job.layout, job.dtype, method)


def nbytes(tree: Any) -> int:
    """Bytes of all arrays in a tree of shapes, two int4 to a byte."""
    return sum(_bits(x.dtype) * prod(x.shape) // 8 for x in jax.tree.leaves(tree))


def _bits(dtype: Any) -> int:
    dtype = jnp.dtype(dtype)
    if dtype == jnp.bool_:
        return 8
    info = jnp.iinfo if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo
    return int(info(dtype).bits)
