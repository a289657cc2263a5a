"""How the arrays of a QTensor are laid out over a mesh, given the leaf's spec."""

from dataclasses import dataclass, replace
from math import prod
from typing import Any, TypeVar

import jax
from jax.sharding import NamedSharding, PartitionSpec

from qjax.core.coded import Coded
from qjax.core.double_quant import DoubleQuantized
from qjax.core.layout import Layout
from qjax.core.qtensor import QTensor, Sparse, Stacked

Leaf = TypeVar("Leaf", QTensor, Stacked)

Axis = Any
"""One entry of a PartitionSpec: a mesh axis, several, or None."""


@dataclass(frozen=True)
class MatrixSpec:
    """A leaf's spec in matrix form: leading axes, K and N."""

    lead: tuple[Axis, ...]
    k: Axis
    n: Axis


def matrix_spec(q: QTensor, spec: PartitionSpec) -> MatrixSpec:
    """The spec of `[*lead, K, N]` for a leaf sharded by `spec`.

    Raises:
        ValueError: an axis is sharded that is not the outermost one of K or of N.
    """
    entries = (*spec, *(None,) * (q.ndim - len(spec)))
    layers = q.ndim - len(q.layout.roles)
    own = entries[layers:]
    found: dict[str, Axis] = {}
    for role in "kn":
        axes = q.layout.axes(role)
        inner = [i for i in axes[1:] if own[i] is not None]
        if inner:
            raise ValueError(
                f"a leaf of layout {q.layout.roles!r} is sharded by {spec}: of several "
                f"axes that make up {role.upper()} only the first may be sharded"
            )
        found[role] = own[axes[0]] if axes else None
    batch = tuple(own[i] for i in q.layout.axes("b"))
    return MatrixSpec((*entries[:layers], *batch), found["k"], found["n"])


def partition_specs(q: Leaf, spec: PartitionSpec, mesh: Any) -> Leaf:
    """A quantized leaf of PartitionSpecs, one for every child of `q`.

    Args:
      q: the leaf (arrays or shapes).
      spec: how the float leaf would be sharded.
      mesh: gives the lengths of the mesh axes.

    Raises:
        ValueError: a shard of K would cut a group or a word, a shard of N a block or a
            word of zeros, or a child has no axis for the sharding.
    """
    if isinstance(q, Stacked):
        runs = tuple(partition_specs(p, spec, mesh) for p in q.parts)
        return replace(q, parts=runs)
    m = matrix_spec(q, spec)
    ways_k, ways_n = ways(m.k, mesh), ways(m.n, mesh)
    parts = tuple(_coded_specs(p, m, ways_k, ways_n) for p in q.parts)

    def factor(value: Any, keep_k: bool) -> Any:
        if value is None:
            return None
        one = replace(m, n=None) if keep_k else replace(m, k=None)
        if isinstance(value, Coded):
            counts = (ways_k, 1) if keep_k else (1, ways_n)
            return _coded_specs(value, one, *counts)
        return PartitionSpec(*m.lead, one.k, one.n)

    if q.sparse is not None and ways_k * ways_n > 1:
        raise ValueError("a leaf with sparse outliers cannot be sharded over K or N")
    if q.sparse is not None and type(q.sparse) is not Sparse:
        raise ValueError(
            "a leaf whose outliers are packed for hardware has no shards; shard "
            "qjax.unpack of it"
        )
    return replace(
        q,
        parts=parts,
        left=factor(q.left, True),
        right=factor(q.right, False),
        sparse=jax.tree.map(lambda _: PartitionSpec(*m.lead, None), q.sparse),
        bias=None if q.bias is None else PartitionSpec(*m.lead, m.n),
        # Ranges and transforms are small and whole on every device of a layer.
        acts=jax.tree.map(lambda x: PartitionSpec(*m.lead[: x.ndim]), q.acts),
    )


def obstacle(q: QTensor, spec: PartitionSpec, mesh: Any) -> str:
    """Why the body of a `shard_map` cannot take shards of `q`; empty if it can."""
    entries = (*spec, *(None,) * (q.ndim - len(spec)))[q.ndim - len(q.layout.roles) :]
    inner = [i for r in "kn" for i in q.layout.axes(r)[1:] if entries[i] is not None]
    if inner:
        return f"sharded by {spec} along an inner axis of K or N"
    m = matrix_spec(q, spec)
    ways_k, ways_n = ways(m.k, mesh), ways(m.n, mesh)
    double = any(isinstance(p.scale, DoubleQuantized) for p in q.parts)
    found = {
        "outliers": q.sparse is not None and ways_k * ways_n > 1,
        "transforms": q.moved and ways_k * ways_n > 1,
        "double-quantized scales": double and ways_k * ways_n > 1,
        "a bias, which every shard of K would add": q.bias is not None and ways_k > 1,
    }
    names = ", ".join(name for name, there in found.items() if there)
    return f"sharded by {spec} with {names}" if names else ""


def shard(q: Leaf, spec: PartitionSpec, mesh: Any) -> Leaf:
    """`q` placed on `mesh` as its float leaf would be by `spec`."""
    specs = partition_specs(q, spec, mesh)
    leaves, tree = jax.tree.flatten(q)
    where = jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, PartitionSpec))
    placed = [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(leaves, where)]
    return jax.tree.unflatten(tree, placed)


def ways(axis: Axis, mesh: Any) -> int:
    """Into how many shards one entry of a spec cuts its axis."""
    names = axis if isinstance(axis, tuple) else (axis,)
    return prod(mesh.shape[name] for name in names if name is not None)


def _coded_specs(part: Coded, m: MatrixSpec, ways_k: int, ways_n: int) -> Coded:
    if type(part) is not Coded:
        raise ValueError("a packed leaf cannot be sharded; shard first, or unpack it")
    _check_whole(part, ways_k, ways_n)
    format, (Gk, Gn) = part.format, part.format.granularity.counts(*part.shape)
    grid_spec = PartitionSpec(*m.lead, m.k if Gk > 1 else None, m.n if Gn > 1 else None)
    scale = grid_spec
    if isinstance(part.scale, DoubleQuantized):
        scale = jax.tree.map(lambda _: PartitionSpec(), part.scale)
    return Coded(
        PartitionSpec(*m.lead, m.k, m.n),
        scale,
        None if part.zero is None else grid_spec,
        None if part.codebook is None else PartitionSpec(*m.lead, None),
        None if part.global_scale is None else PartitionSpec(*m.lead, None, None),
        format,
        part.shape,
    )


def _check_whole(part: Coded, ways_k: int, ways_n: int) -> None:
    """A shard holds whole groups, whole words, whole blocks."""
    K, N = part.shape
    bits, (rows, cols) = part.format.bits or 8, part.format.granularity.block(K, N)
    local_k, local_n = K // ways_k, N // ways_n
    if K % ways_k or N % ways_n:
        raise ValueError(f"(K, N) = {part.shape} does not split {ways_k} x {ways_n}")
    if ways_k > 1 and rows < K and local_k % rows:
        raise ValueError(
            f"{part.format.name} has groups of {rows}, but each of {ways_k} shards of "
            f"K = {K} holds {local_k} inputs; a shard must hold whole groups"
        )
    length = getattr(part.format, "length", 1)
    if ways_k > 1 and local_k % length:
        raise ValueError(
            f"a code stands for {length} inputs, but each of {ways_k} shards of "
            f"K = {K} holds {local_k}; a shard must hold whole vectors"
        )
    if ways_k > 1 and bits < 8 and local_k * bits % 32:
        raise ValueError(
            f"{bits}-bit codes fill 32-bit words, but each of {ways_k} shards of "
            f"K = {K} holds {local_k} codes; a shard must hold whole words"
        )
    if ways_n > 1 and 1 < cols < N and local_n % cols:
        raise ValueError(
            f"{part.format.name} has blocks {cols} wide, but each of {ways_n} shards "
            f"of N = {N} holds {local_n} outputs"
        )
    packed = part.zero is not None and getattr(part.format, "zero", "") == "int"
    if ways_n > 1 and packed and bits < 8 and cols < N and local_n * bits % 32:
        raise ValueError(
            f"{bits}-bit zero points fill 32-bit words, but each of {ways_n} shards of "
            f"N = {N} holds {local_n} of them; a shard must hold whole words"
        )
    if ways_k * ways_n > 1 and isinstance(part.scale, DoubleQuantized):
        raise ValueError("double-quantized scales cannot be sharded over K or N")


def localize(q: QTensor, spec: PartitionSpec, mesh: Any) -> QTensor:
    """Static shapes of one shard, for children that are already local."""
    m = matrix_spec(q, spec)
    ways_k, ways_n = ways(m.k, mesh), ways(m.n, mesh)
    sizes = list(q.layout.sizes)
    for role, count in (("k", ways_k), ("n", ways_n)):
        axes = q.layout.axes(role)
        if axes:
            sizes[axes[0]] //= count

    def local(value: Any, k: int, n: int) -> Any:
        if not isinstance(value, Coded):
            return value
        K, N = value.shape
        return replace(value, shape=(K // k, N // n))

    return replace(
        q,
        parts=tuple(local(p, ways_k, ways_n) for p in q.parts),
        left=local(q.left, ways_k, 1),
        right=local(q.right, 1, ways_n),
        layout=Layout(q.layout.roles, tuple(sizes)),
    )
