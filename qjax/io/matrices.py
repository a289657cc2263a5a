"""A quantized matrix on its way to a checkpoint of torch, or back from one."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from qjax.core.coded import Coded
from qjax.core.formats import Format, Int
from qjax.core.layout import Layout
from qjax.core.qtensor import Activation, QTensor, SiteActs
from qjax.core.transforms import Permutation
from qjax.io.bits import pack_rows, unpack_rows


def integer_of(format: Format) -> Int:
    """A format that is known to be of integers."""
    assert isinstance(format, Int), format
    return format


@dataclass(frozen=True)
class Matrix:
    """One coded matrix `[K, N]` on the host; methods give torch's order, `[N, K]`.

    Attributes:
      path: the leaf's path, for messages.
      part: codes and grid, numpy arrays without leading axes.
      acts: what happens to the input; `t_in` is `order`.
      order: feature `j` of the codes is feature `order[j]` of the input; None: `j`.
      dtype: of the float weight.
    """

    path: str
    part: Coded
    acts: SiteActs
    order: np.ndarray | None
    dtype: Any

    @classmethod
    def of(cls, path: str, q: QTensor) -> "Matrix":
        """The only part of a quantized leaf that has no leading axes.

        Raises:
          ValueError: the leaf is more than codes, a grid and an order of features; the
            message names it.
        """
        q = jax.tree.map(np.asarray, q).settled()
        _check_only_part(path, q)
        acts = _common_acts(path, q)
        order = None
        if isinstance(acts.t_in, Permutation):
            order = np.asarray(acts.t_in.index)
        elif acts.t_in is not None:
            raise ValueError(
                f"{path} has a transform of its input, {type(acts.t_in).__name__}, not "
                "folded into the layer before, which no checkpoint format holds"
            )
        return cls(path, q.parts[0], acts, order, q.dtype)

    @property
    def activation(self) -> Activation | None:
        """How the input is coded."""
        return self.acts.activation

    @property
    def integer(self) -> Int:
        """The format of codes that are integers."""
        return integer_of(self.part.format)

    @property
    def shape(self) -> tuple[int, int]:
        """`(K, N)`."""
        return self.part.shape

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return self.part.format.bits or 8

    @property
    def group(self) -> int | None:
        """Features that share a scale; None: all of a column."""
        return self.part.format.granularity.rows

    def codes(self) -> np.ndarray:
        """`[N, K]` in the order of the input: unsigned codes, or float8."""
        rows = self.part.codes.T
        if self.bits < 8:
            rows = unpack_rows(rows, self.bits, self.shape[0])
        elif isinstance(self.part.format, Int):
            rows = rows.view(np.uint8) ^ 0x80
        return rows if self.order is None else rows[:, np.argsort(self.order)]

    def words(self) -> np.ndarray:
        """Integer codes packed along the input, int32 `[N, ceil(K*bits/32)]`."""
        if self.order is None and self.bits < 8:
            return self.part.codes.T.view(np.int32)
        return pack_rows(self.codes(), self.bits)

    def zeros(self) -> np.ndarray:
        """Unsigned zero points `[Gk, Gn]`; those of a symmetric grid are all alike."""
        format, counts = self.part.format, self.part.scale.shape
        assert isinstance(format, Int)
        if format.zero == "none":
            return np.full(counts, format.half, np.uint8)
        if format.bits == 8:
            return self.part.zero.view(np.uint8) ^ 0x80
        return unpack_rows(self.part.zero, format.bits, counts[1])

    def groups(self) -> np.ndarray:
        """The group of every feature of the input, int32 `[K]`."""
        ordered = np.arange(self.shape[0]) // (self.group or self.shape[0])
        found = ordered if self.order is None else ordered[np.argsort(self.order)]
        return found.astype(np.int32)


def _check_only_part(path: str, q: QTensor) -> None:
    if q.layout.roles != "kn":
        raise ValueError(
            f"{path} is quantized with the axes {q.layout.roles!r}; checkpoint formats "
            "hold linear layers alone, 'kn': leave it in float"
        )
    extra = {
        f"{len(q.parts)} coded parts": len(q.parts) != 1,
        "a low-rank part": q.left is not None,
        "sparse outliers": q.sparse is not None,
        "a correction bias that the model has no place for": q.bias is not None,
        "a transform of its output": any(a.t_out is not None for a in q.acts),
    }
    for what, there in extra.items():
        if there:
            raise ValueError(f"{path} has {what}, which no checkpoint format holds")


def _common_acts(path: str, q: QTensor) -> SiteActs:
    first = q.site(0)
    flat, tree = jax.tree.flatten(first)
    for other in q.acts[1:]:
        also, same = jax.tree.flatten(other)
        if tree != same or not all(map(np.array_equal, flat, also)):
            raise ValueError(
                f"{path} codes its input differently at its {len(q.acts)} uses, which "
                "no checkpoint format holds"
            )
    return first


def words_of(rows: np.ndarray, bits: int, K: int) -> np.ndarray:
    """Our codes `[.., N]` of int32 words `[N, ceil(K*bits/32)]` packed along K."""
    if bits < 8:
        return np.ascontiguousarray(rows.T).view(np.uint32)
    return np.ascontiguousarray((unpack_rows(rows, 8, K) ^ 0x80).T).view(np.int8)


def order_of(owner: str, groups: np.ndarray, size: int) -> np.ndarray | None:
    """The order that makes groups contiguous; None where they are so already.

    Raises:
      ValueError: a group does not have `size` features.
    """
    count = len(groups) // size
    wanted = np.repeat(np.arange(count), size)
    if np.array_equal(groups, wanted):
        return None
    order = np.argsort(groups, kind="stable")
    if not np.array_equal(groups[order], wanted):
        raise ValueError(
            f"{owner} does not put {size} of {len(groups)} features into each of "
            f"{count} groups"
        )
    return order.astype(np.int32)


def tensor(part: Coded, dtype: Any, acts: SiteActs | None = None) -> QTensor:
    """The quantized linear layer of a coded matrix."""
    layout = Layout("kn", part.shape)
    return QTensor.of(part, layout, dtype, () if acts is None else (acts,))


def in_order(part: Coded, order: np.ndarray) -> Coded:
    """The same weights with their features (rows of `[K, N]`) taken in an order."""
    bits = part.format.bits or 8
    if bits == 8:
        return replace(part, codes=part.codes[order])
    rows = unpack_rows(part.codes.T, bits, part.shape[0])[:, order]
    return replace(part, codes=words_of(pack_rows(rows, bits), bits, part.shape[0]))
