"""Which weights share a scale: blocks of `w[K, N]`, the last one possibly partial."""

from dataclasses import dataclass
from math import ceil

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped


@dataclass(frozen=True)
class Granularity:
    """Blocks of `rows` x `cols` of `w[K, N]` share a scale; None is the whole axis.

    Args:
      rows: block height along K.
      cols: block width along N.

    Raises:
      ValueError: a size is not a positive whole number.
    """

    rows: int | None
    cols: int | None

    def __post_init__(self):
        for field in ("rows", "cols"):
            size = getattr(self, field)
            whole = isinstance(size, int) and not isinstance(size, bool)
            if size is not None and (not whole or size < 1):
                raise ValueError(
                    f"Granularity.{field} is {size!r}; "
                    "it must be a positive whole number, or None for the whole axis"
                )

    def block(self, K: int, N: int) -> tuple[int, int]:
        """Height and width of one block of `w[K, N]`."""
        return self.rows or K, self.cols or N

    def counts(self, K: int, N: int) -> tuple[int, int]:
        """Number of blocks along K and along N, partial ones included."""
        rows, cols = self.block(K, N)
        return ceil(K / rows), ceil(N / cols)

    @property
    def label(self) -> str:
        """A short name: `tensor`, `channel`, `g128`, `128x128`."""
        names = {(None, None): "tensor", (None, 1): "channel"}
        if (self.rows, self.cols) in names:
            return names[self.rows, self.cols]
        if self.cols == 1:
            return f"g{self.rows}"
        return f"{self.rows or 'all'}x{self.cols or 'all'}"


def tensor() -> Granularity:
    """One scale for the whole matrix."""
    return Granularity(None, None)


def channel() -> Granularity:
    """One scale for each output feature, that is for each column of `w[K, N]`."""
    return Granularity(None, 1)


def group(size: int) -> Granularity:
    """One scale for every `size` consecutive inputs of one output feature."""
    return Granularity(size, 1)


def block(rows: int | None, cols: int | None) -> Granularity:
    """One scale for every `rows` x `cols` block of `w[K, N]`; None is the whole axis.

    Of an activation, which is coded as `x.T[K, M]`, `block(1, None)` gives each feature
    a scale of its own.
    """
    return Granularity(rows, cols)


def token() -> Granularity:
    """One scale for each token of `x[M, K]`, which is coded as `x.T[K, M]`."""
    return channel()


def to_blocks(
    w: Shaped[Array, "... K N"], granularity: Granularity, fill: float = 0
) -> Shaped[Array, "... Gk rows Gn cols"]:
    """Cut `w` into its blocks, the partial ones filled up with `fill`."""
    K, N = w.shape[-2:]
    rows, cols = granularity.block(K, N)
    Gk, Gn = granularity.counts(K, N)
    if (Gk * rows, Gn * cols) != (K, N):
        widths = [(0, 0)] * (w.ndim - 2) + [(0, Gk * rows - K), (0, Gn * cols - N)]
        w = jnp.pad(w, widths, constant_values=np.asarray(fill, w.dtype))
    return w.reshape(*w.shape[:-2], Gk, rows, Gn, cols)


def block_sizes(granularity: Granularity, K: int, N: int) -> np.ndarray:
    """How many weights each block holds, `[Gk, Gn]`; partial blocks hold fewer."""
    rows, cols = granularity.block(K, N)
    Gk, Gn = granularity.counts(K, N)
    heights = np.minimum(rows, K - rows * np.arange(Gk))
    widths = np.minimum(cols, N - cols * np.arange(Gn))
    return heights[:, None] * widths[None, :]


def spread(
    values: Shaped[Array, "... Gk Gn"], granularity: Granularity, K: int, N: int
) -> Shaped[Array, "... K_or_1 N_or_1"]:
    """Give each weight its block's value, in a shape that broadcasts to `[..., K, N]`.

    Axes which hold a single block stay of size 1, so that nothing is repeated in memory
    where broadcasting does it.
    """
    rows, cols = granularity.block(K, N)
    return _repeat(_repeat(values, -2, rows, K), -1, cols, N)


def _repeat(values: Array, axis: int, times: int, length: int) -> Array:
    axis += values.ndim
    if values.shape[axis] == 1 or times == 1:
        return values
    shape = list(values.shape)
    wide = jnp.broadcast_to(
        jnp.expand_dims(values, axis + 1),
        [*shape[: axis + 1], times, *shape[axis + 1 :]],
    )
    shape[axis] *= times
    return wide.reshape(shape)[(slice(None),) * axis + (slice(length),)]
