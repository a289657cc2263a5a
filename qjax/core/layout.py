"""Which axes of a parameter are contracted, kept, or batched."""

from dataclasses import dataclass
from math import prod
from typing import Any

import jax.numpy as jnp


@dataclass(frozen=True)
class Layout:
    """Map between a leaf's own axes and the matrix `w[..., K, N]`.

    `roles` has one letter for each trailing axis of the leaf: `k` contracted, `n`
    kept in the output, `b` batched (experts). `sizes` are those axes' lengths; a `b`
    entry is 0, because batch lengths belong to the arrays, so that one layout serves
    every slice. Axes in front of them (layers) are not described at all.

    >>> Layout("knn", (256, 8, 32)).N
    256
    """

    roles: str
    sizes: tuple[int, ...]

    def __post_init__(self):
        if len(self.roles) != len(self.sizes) or set(self.roles) - set("bkn"):
            raise ValueError(
                f"layout roles {self.roles!r} must be one of 'b', 'k', 'n' for each of "
                f"the {len(self.sizes)} sizes {self.sizes}"
            )

    @property
    def K(self) -> int:
        """Contracted (input) features."""
        return prod(s for r, s in zip(self.roles, self.sizes) if r == "k")

    @property
    def N(self) -> int:
        """Output features."""
        return prod(s for r, s in zip(self.roles, self.sizes) if r == "n")

    @property
    def batch_axes(self) -> int:
        """How many trailing axes are batched."""
        return self.roles.count("b")

    def axes(self, role: str) -> tuple[int, ...]:
        """Positions of a role among the trailing axes, in leaf order."""
        return tuple(i for i, r in enumerate(self.roles) if r == role)

    def without_batch(self, count: int) -> "Layout":
        """The layout of one slice along the first `count` batched axes."""
        gone = self.axes("b")[:count]
        kept = [i for i in range(len(self.roles)) if i not in gone]
        roles = "".join(self.roles[i] for i in kept)
        return Layout(roles, tuple(self.sizes[i] for i in kept))

    def leaf_shape(self, lead: tuple[int, ...]) -> tuple[int, ...]:
        """The leaf's shape, given the leading axes of its matrix `[*lead, K, N]`."""
        layers = lead[: len(lead) - self.batch_axes]
        batch = iter(lead[len(layers) :])
        own = (next(batch) if r == "b" else s for r, s in zip(self.roles, self.sizes))
        return (*layers, *own)

    def to_matrix(self, leaf: Any) -> Any:
        """Leaf axes to `[*layers, *batch, K, N]`."""
        layers = leaf.ndim - len(self.roles)
        order = self.axes("b") + self.axes("k") + self.axes("n")
        moved = jnp.transpose(leaf, (*range(layers), *(layers + i for i in order)))
        lead = moved.shape[: layers + self.batch_axes]
        return moved.reshape(*lead, self.K, self.N)

    def from_matrix(self, matrix: Any) -> Any:
        """`[*layers, *batch, K, N]` back to the leaf's own axes."""
        lead = matrix.shape[:-2]
        layers = len(lead) - self.batch_axes
        order = self.axes("b") + self.axes("k") + self.axes("n")
        kn = (self.sizes[i] for i in self.axes("k") + self.axes("n"))
        inverse = sorted(range(len(order)), key=order.__getitem__)
        split = matrix.reshape(*lead, *kn)
        return jnp.transpose(split, (*range(layers), *(layers + i for i in inverse)))
