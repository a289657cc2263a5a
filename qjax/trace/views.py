"""A parameter on its way to its use: the leaf, seen through layout operations."""

from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod
from typing import Any

import jax
import jax.numpy as jnp

from qjax.core.carrier import Carrier
from qjax.core.layout import Layout
from qjax.core.qtensor import QTensor, Stacked, is_quantized

PLACEMENT = frozenset({"sharding_constraint", "reshard", "mesh_cast"})
IDENTITY = PLACEMENT | {"copy", "copy_p"}
VARYING = frozenset({"pvary", "pcast", "pbroadcast"})
LAYOUT = (
    IDENTITY
    | VARYING
    | {
        "transpose",
        "reshape",
        "convert_element_type",
        "squeeze",
        "expand_dims",
        "broadcast_in_dim",
        "slice",
        "dynamic_slice",
    }
)


@dataclass(frozen=True)
class View:
    """How the axes of a value are made of the axes of its leaf.

    A leaf's axes are cut into *atoms* where a reshape splits them: `atoms[i]` is a
    size, `owner[i]` the leaf axis it belongs to, in row-major order. `axes[d]` names
    the atoms of the value's axis `d`, outermost first; `()` is an axis of length 1.
    """

    atoms: tuple[int, ...]
    owner: tuple[int, ...]
    axes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, shape: tuple[int, ...]) -> "View":
        """The leaf as it is."""
        numbers = tuple(range(len(shape)))
        return cls(tuple(shape), numbers, tuple((i,) for i in numbers))

    @property
    def shape(self) -> tuple[int, ...]:
        """The value's shape."""
        return tuple(prod(self.atoms[a] for a in axis) for axis in self.axes)

    @property
    def leaf_ndim(self) -> int:
        """How many axes the leaf has."""
        return max(self.owner, default=-1) + 1

    @property
    def identity(self) -> bool:
        """Whether the value is the leaf itself."""
        return self == View.of(self.shape)

    def transpose(self, order: tuple[int, ...]) -> "View":
        """Axes in another order."""
        return replace(self, axes=tuple(self.axes[i] for i in order))

    def squeeze(self, dimensions: tuple[int, ...]) -> "View":
        """Without these axes of length 1."""
        kept = (a for d, a in enumerate(self.axes) if d not in dimensions)
        return replace(self, axes=tuple(kept))

    def reshape(self, sizes: tuple[int, ...]) -> "View | None":
        """The same values under another shape; None if an axis cannot be cut so."""
        view, position, axes = self, 0, []
        queue = [a for axis in self.axes for a in axis if self.atoms[a] != 1]
        for size in sizes:
            axis: list[int] = []
            while prod(view.atoms[a] for a in axis) < size:
                if position == len(queue):
                    return None
                need = size // prod(view.atoms[a] for a in axis)
                atom = queue[position]
                if view.atoms[atom] > need:
                    if view.atoms[atom] % need:
                        return None
                    view = view._split(atom, need)
                    queue = [a + (a > atom) for a in queue]
                    axes = [tuple(a + (a > atom) for a in x) for x in axes]
                    axis = [a + (a > atom) for a in axis]
                    queue.insert(position + 1, atom + 1)
                axis.append(queue[position])
                position += 1
            if prod(view.atoms[a] for a in axis) != size:
                return None
            axes.append(tuple(axis))
        return replace(view, axes=tuple(axes))

    def _split(self, atom: int, outer: int) -> "View":
        """Cut one atom into `(outer, rest)`."""
        inner = self.atoms[atom] // outer
        atoms = (*self.atoms[:atom], outer, inner, *self.atoms[atom + 1 :])
        owner = (*self.owner[: atom + 1], *self.owner[atom:])
        return View(atoms, owner, ())

    def broadcast(self, sizes: tuple[int, ...], dims: tuple[int, ...]) -> "View | None":
        """New axes of length 1; None where values would be repeated."""
        axes: list[tuple[int, ...]] = [()] * len(sizes)
        for d, axis in zip(dims, self.axes):
            axes[d] = axis
        view = replace(self, axes=tuple(axes))
        return view if view.shape == tuple(sizes) else None

    def first(self) -> "View | None":
        """Of one slice of the leading axis; None if that is not the leaf's first."""
        if not self.axes or self.axes[0] != (0,) or self.owner.count(0) != 1:
            return None
        axes = tuple(tuple(a - 1 for a in axis) for axis in self.axes[1:])
        return View(self.atoms[1:], tuple(o - 1 for o in self.owner[1:]), axes)

    def roles(self, contracted: tuple[int, ...], batched: tuple[int, ...]) -> str:
        """One letter per atom, given which axes of the value are contracted."""
        letter = dict.fromkeys(range(len(self.atoms)), "n")
        for axes, role in ((contracted, "k"), (batched, "b")):
            letter |= {a: role for d in axes for a in self.axes[d]}
        return "".join(letter[i] for i in range(len(self.atoms)))

    def layout(self, roles: str) -> Layout | None:
        """Roles of the leaf's own axes; None if one axis plays two roles."""
        merged: list[str] = []
        for axis in range(self.leaf_ndim):
            parts = [
                (r, s) for r, o, s in zip(roles, self.owner, self.atoms) if o == axis
            ]
            own = {r for r, s in parts if s != 1} or {parts[0][0]}
            if len(own) > 1:
                return None
            merged.append(own.pop())
        length = self.leaf_shape
        sizes = tuple(0 if r == "b" else s for r, s in zip(merged, length))
        return Layout("".join(merged), sizes)

    @property
    def leaf_shape(self) -> tuple[int, ...]:
        """The leaf's own shape."""
        return tuple(
            prod(s for s, o in zip(self.atoms, self.owner) if o == axis)
            for axis in range(self.leaf_ndim)
        )

    def of_array(self, leaf: Any) -> Any:
        """The value, from the leaf's array."""
        order = [a for axis in self.axes for a in axis]
        dropped = [a for a in range(len(self.atoms)) if a not in order]
        split = jnp.transpose(leaf.reshape(self.atoms), (*dropped, *order))
        return split.reshape(self.shape)


@dataclass(frozen=True)
class Tracked:
    """A value that is still a parameter.

    `value` is a float array as it now is, or a quantized leaf as it was stored, whose
    pending layout operations are in `view`. `leaf` numbers it in the enclosing body;
    `picks` are stack lengths and layer numbers taken by indexing (None when known only
    at run time); `base` is how many sites the leaf had before the enclosing body.
    """

    value: Any
    view: View
    leaf: Any
    dtype: Any
    picks: tuple[tuple[int, int | None], ...] = ()
    base: int = 0

    @property
    def quantized(self) -> bool:
        """Whether the leaf is in low bits, or carries more than a float array."""
        return is_quantized(self.value) or isinstance(self.value, Carrier)

    @property
    def shape(self) -> tuple[int, ...]:
        """The value's shape."""
        return self.view.shape

    def array(self) -> Any:
        """The value as a float array."""
        if not self.quantized:
            return self.value
        if isinstance(self.value, QTensor) and self.value.bias is not None:
            raise ValueError(
                f"a leaf of shape {self.value.shape} with a correction bias meets an "
                "operation without a low-bit rule; decoding it would lose the bias"
            )
        leaf = qdequantize(self.value, self.dtype)
        return self.view.of_array(leaf)


@dataclass(frozen=True)
class Joined:
    """Parameters concatenated along `axis`: fused q, k, v."""

    pieces: tuple[Any, ...]
    axis: int

    @property
    def shape(self) -> tuple[int, ...]:
        """The value's shape."""
        shapes = [p.shape for p in self.pieces]
        joined = list(shapes[0])
        joined[self.axis] = sum(s[self.axis] for s in shapes)
        return tuple(joined)

    def array(self) -> Any:
        """The value as a float array."""
        return jnp.concatenate([as_array(p) for p in self.pieces], axis=self.axis)


def as_array(value: Any) -> Any:
    """Any value of the interpreter as an array."""
    return value.array() if isinstance(value, (Tracked, Joined)) else value


def qdequantize(value: QTensor | Stacked | Carrier, dtype: Any) -> jax.Array:
    """Decode a leaf at its use; the name under which it appears in a jaxpr."""
    return _qdequantize(value, jnp.dtype(dtype))


def _decode(value: QTensor | Stacked | Carrier, dtype: Any) -> jax.Array:
    return value.dequantize(dtype)


_decode.__name__ = "qdequantize"
_qdequantize = jax.jit(_decode, static_argnums=1)


def follow(eqn: Any, name: str, source: Tracked, rest: list[Any]) -> Tracked | None:
    """A tracked value through one layout operation; None where it stops being one."""
    p, view = eqn.params, source.view
    if name in ("slice", "dynamic_slice"):
        return _pick(eqn, name, source, rest)
    moved: View | None = view
    dtype = source.dtype
    if name == "transpose":
        moved = view.transpose(tuple(p["permutation"]))
    elif name == "reshape":
        moved = None if p.get("dimensions") else view.reshape(tuple(p["new_sizes"]))
    elif name == "squeeze":
        moved = view.squeeze(tuple(p["dimensions"]))
    elif name == "broadcast_in_dim":
        dims = tuple(int(d) for d in p["broadcast_dimensions"])
        moved = view.broadcast(tuple(p["shape"]), dims)
    elif name == "expand_dims":
        moved = view.reshape(tuple(eqn.outvars[0].aval.shape))
    elif name == "convert_element_type":
        dtype = p["new_dtype"]
        moved = view if jnp.issubdtype(dtype, jnp.floating) else None
    if moved is None:
        return None
    value = source.value
    if source.quantized and name in VARYING:
        bind = eqn.primitive.bind
        value = jax.tree.map(lambda x: bind(x, **eqn.params), value)
    return replace(source, value=value, view=moved, dtype=dtype)


def _pick(eqn: Any, name: str, source: Tracked, rest: list[Any]) -> Tracked | None:
    """One layer of a stacked leaf, taken by `w[i]`."""
    sizes = tuple(eqn.outvars[0].aval.shape)
    inner, length = source.view.first(), source.shape[0] if source.shape else 0
    if inner is None or sizes[0] != 1 or sizes[1:] != source.shape[1:] or length == 1:
        return None
    index = eqn.params["start_indices"][0] if name == "slice" else None
    value = source.value
    if source.quantized:
        lead = (
            value.ndim - len(value.parts[0].layout.roles)
            if isinstance(value, Stacked)
            else value.ndim - len(value.layout.roles)
        )
        if lead < 1 or (isinstance(value, Stacked) and index is None):
            return None
        value = _layer(value, rest[0] if index is None else index)
    view = replace(inner, axes=((), *inner.axes))
    return replace(
        source, value=value, view=view, picks=(*source.picks, (length, index))
    )


def _layer(value: QTensor | Stacked | Carrier, index: Any) -> Any:
    if isinstance(value, Stacked):
        return value.layers(index, index + 1)[0]

    def take(x):
        return jax.lax.dynamic_index_in_dim(x, index, keepdims=False)

    return jax.tree.map(take, value)


def atom_roles(leaf: QTensor | Carrier, view: View) -> str:
    """The roles of a leaf's atoms, as it was coded."""
    lead = view.leaf_ndim - len(leaf.layout.roles)
    roles = "b" * lead + leaf.layout.roles
    return "".join(roles[o] for o in view.owner)


def ordered(atoms: tuple[int, ...]) -> bool:
    """Whether atoms stand in leaf order already."""
    return all(a < b for a, b in pairwise(atoms))


jax.tree_util.register_dataclass(
    Tracked,
    data_fields=["value"],
    meta_fields=["view", "leaf", "dtype", "picks", "base"],
)
jax.tree_util.register_dataclass(Joined, data_fields=["pieces"], meta_fields=["axis"])
