"""The quantized leaf: `W = T_in (sum Q_i + L R + S) T_out`, and a bias `b`."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from math import prod
from operator import add
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp

from qjax.core.coded import Coded
from qjax.core.formats import Additive, Format
from qjax.core.layout import Layout
from qjax.core.pytrees import register


@dataclass(frozen=True)
class Activation:
    """How a site's input is coded before the contraction.

    The input is coded as `x.T[K, M]`: `Int(8, token())` gives one scale per token.
    `dynamic` scales come from the batch at hand, static ones from calibration; of
    NVFP4 only the global scale is ever static.

    Args:
      format: the number format.
      dynamic: whether the scales come from the batch.
      outliers: LLM.int8(): features with a magnitude of at least this in the batch stay
        in float (dot sites only); None codes all of them.

    Raises:
      ValueError: `outliers` is not above zero, or the range is static; the format has
        a code for several features.
    """

    format: Format
    dynamic: bool = True
    outliers: float | int | None = None

    def __post_init__(self):
        if isinstance(self.format, Additive):
            raise ValueError(
                f"Activation.format is {self.format.name}, whose vectors are learned "
                "from weights; take a format such as Int(8, token())"
            )
        if self.outliers is None:
            return
        number = isinstance(self.outliers, (int, float))
        if not number or isinstance(self.outliers, bool) or not self.outliers > 0:
            raise ValueError(
                "Activation.outliers must be a threshold above 0, or None for no "
                f"outliers, got {self.outliers!r}"
            )
        if not self.dynamic:
            raise ValueError(
                f"Activation.outliers is {self.outliers!r} with dynamic=False; outlier "
                "features are found in the batch, so the range must be dynamic"
            )


@dataclass(frozen=True)
class SiteActs:
    """What happens to the activation at one site of the leaf.

    `scale` and `zero` (`[..., Gk, 1]`) are the static activation range, of NVFP4
    `global_scale[..., 1, 1]` (all absent when dynamic); `t_in` and `t_out` are
    transforms (`qjax.core.transforms`) on either side of the weight.
    """

    scale: Any = None
    zero: Any = None
    t_in: Any = None
    t_out: Any = None
    activation: Activation | None = None
    global_scale: Any = None


@dataclass(frozen=True)
class Sparse:
    """Outliers kept in float: `values[..., n]` at `rows[..., n]`, `cols[..., n]`.

    Unused slots hold the value 0 (at any position), so that layers with different
    counts stack.
    """

    values: Any
    rows: Any
    cols: Any

    def dense(self, shape: tuple[int, int], dtype: Any) -> jax.Array:
        """The sparse part as `[..., K, N]`."""
        lead = self.values.shape[:-1]
        flat = [x.reshape(prod(lead), -1) for x in (self.values, self.rows, self.cols)]

        def scatter(values, rows, cols):
            return jnp.zeros(shape, dtype).at[rows, cols].add(values.astype(dtype))

        return jax.vmap(scatter)(*flat).reshape(*lead, *shape)


@dataclass(frozen=True)
class QTensor:
    """A parameter in low bits.

    Children: `parts` (coded weights, summed), `left[..., K, r]` and `right[..., r, N]`
    (arrays or `Coded`), `sparse`, `bias[..., N]`, `acts` (one entry per site of the
    leaf in program order; a single entry serves all). Static: `layout` and the leaf's
    `dtype`. Leading axes (layers, experts) are those of the children, so a QTensor
    scans, vmaps and slices as the leaf would.
    """

    parts: tuple[Coded, ...]
    left: Any
    right: Any
    sparse: Sparse | None
    bias: Any
    acts: tuple[SiteActs, ...]
    layout: Layout
    dtype: Any

    @classmethod
    def of(
        cls,
        parts: Coded | Sequence[Coded],
        layout: Layout,
        dtype: Any,
        acts: Sequence[SiteActs] = (),
        **rest: Any,
    ) -> "QTensor":
        """A QTensor from coded parts; `rest` may name left, right, sparse, bias.

        Raises:
            ValueError: a part's `(K, N)` is not the layout's.
        """
        parts = (parts,) if isinstance(parts, Coded) else tuple(parts)
        for part in parts:
            if part.shape != (layout.K, layout.N):
                raise ValueError(
                    f"a part is coded as (K, N) = {part.shape}, but layout "
                    f"{layout.roles} {layout.sizes} has {(layout.K, layout.N)}"
                )
        extra = {name: rest.pop(name, None) for name in _OPTIONAL}
        if rest:
            raise TypeError(f"unknown QTensor children {sorted(rest)}")
        dtype = jnp.dtype(dtype)
        return cls(parts, **extra, acts=tuple(acts), layout=layout, dtype=dtype)

    @property
    def lead(self) -> tuple[int, ...]:
        """Leading axes of the matrix form: layers, then experts."""
        if self.parts:
            return self.parts[0].lead
        return self.left.lead if isinstance(self.left, Coded) else self.left.shape[:-2]

    def settled(self) -> "QTensor":
        """With a layout that fits the children, where batched axes were sliced away.

        `vmap` and indexing take a leading axis from every child; static data stays.
        """
        missing = self.layout.batch_axes - len(self.lead)
        if missing <= 0:
            return self
        return replace(self, layout=self.layout.without_batch(missing))

    @property
    def shape(self) -> tuple[int, ...]:
        """The leaf's own shape."""
        return self.settled().layout.leaf_shape(self.lead)

    @property
    def ndim(self) -> int:
        """The leaf's number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """How many weights the leaf has."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of every array kept, overhead included."""
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self))

    @property
    def bits_per_weight(self) -> float:
        """`nbytes` in bits over the number of weights."""
        return 8 * self.nbytes / self.size

    @property
    def plain(self) -> bool:
        """Coded parts only: no low rank, outliers, bias or transforms."""
        extra = (self.left, self.sparse, self.bias)
        return bool(self.parts) and all(x is None for x in extra) and not self.moved

    @property
    def moved(self) -> bool:
        """Whether a site has a transform."""
        return any(a.t_in is not None or a.t_out is not None for a in self.acts)

    def site(self, index: int) -> SiteActs:
        """The activation record of the leaf's site number `index`."""
        if not self.acts:
            return SiteActs()
        return self.acts[0 if len(self.acts) == 1 else index]

    def core(self, dtype: Any) -> jax.Array:
        """`sum Q_i + L R + S` as `[..., K, N]`."""
        terms = [part.decode(dtype) for part in self.parts]
        if self.left is not None:
            terms.append(factor(self.left, dtype) @ factor(self.right, dtype))
        if self.sparse is not None:
            terms.append(self.sparse.dense((self.layout.K, self.layout.N), dtype))
        return reduce(add, terms)

    def matrix(self, dtype: Any, site: int = 0) -> jax.Array:
        """`T_in (sum Q_i + L R + S) T_out` as `[..., K, N]`."""
        w, acts = self.core(dtype), self.site(site)
        w = w if acts.t_in is None else acts.t_in.left(w)
        return w if acts.t_out is None else acts.t_out(w)

    def dequantize(self, dtype: Any = None) -> jax.Array:
        """The float leaf: own shape, own dtype unless another is asked for.

        The bias `b` is not part of it.
        """
        layout = self.settled().layout
        return layout.from_matrix(self.matrix(dtype or self.dtype))

    def __getitem__(self, index: Any) -> "QTensor":
        """Index the leading axes (layers, experts) of every child.

        Raises:
            IndexError: there are fewer leading axes.
        """
        reach = index if isinstance(index, tuple) else (index,)
        if len(reach) > len(self.lead):
            raise IndexError(
                f"index {index!r} has {len(reach)} parts; this QTensor of shape "
                f"{self.shape} has leading axes {self.lead}"
            )
        return jax.tree.map(lambda x: x[index], self).settled()


@dataclass(frozen=True)
class Stacked:
    """A scan-stacked leaf whose layers differ in format: runs of equal format.

    `parts[i]` holds the layers `ranges[i] = (start, stop)` of the first axis.
    """

    parts: tuple[QTensor, ...]
    ranges: tuple[tuple[int, int], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The leaf's own shape."""
        return (self.ranges[-1][1], *self.parts[0].shape[1:])

    @property
    def ndim(self) -> int:
        """The leaf's number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """How many weights the leaf has."""
        return prod(self.shape)

    @property
    def dtype(self) -> Any:
        """The leaf's dtype."""
        return self.parts[0].dtype

    @property
    def nbytes(self) -> int:
        """Bytes of every array kept, overhead included."""
        return sum(part.nbytes for part in self.parts)

    @property
    def bits_per_weight(self) -> float:
        """`nbytes` in bits over the number of weights."""
        return 8 * self.nbytes / self.size

    def dequantize(self, dtype: Any = None) -> jax.Array:
        """The float leaf, in its own shape."""
        return jnp.concatenate([part.dequantize(dtype) for part in self.parts])

    def layers(self, start: int, stop: int) -> QTensor:
        """The layers `start:stop`, which must lie within one run."""
        for part, (first, last) in zip(self.parts, self.ranges):
            if first <= start and stop <= last:
                return part[start - first : stop - first]
        raise ValueError(f"layers {start}:{stop} are not within one of {self.ranges}")


def factor(value: Any, dtype: Any) -> jax.Array:
    """A low-rank factor as a float array, coded or not."""
    return value.decode(dtype) if isinstance(value, Coded) else value.astype(dtype)


def is_quantized(leaf: Any) -> TypeGuard[QTensor | Stacked]:
    """Whether a tree node is a quantized leaf."""
    return isinstance(leaf, (QTensor, Stacked))


def dequantize(tree: Any) -> Any:
    """The float tree: every quantized leaf decoded, the rest untouched."""
    return jax.tree.map(
        lambda x: x.dequantize() if is_quantized(x) else x, tree, is_leaf=is_quantized
    )


_OPTIONAL = ("left", "right", "sparse", "bias")


register(SiteActs, ("scale", "zero", "t_in", "t_out", "global_scale"), ("activation",))
register(Sparse, ("values", "rows", "cols"), ())
register(QTensor, ("parts", *_OPTIONAL, "acts"), ("layout", "dtype"))
register(Stacked, ("parts",), ("ranges",))
