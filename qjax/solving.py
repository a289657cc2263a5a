"""Many matrices, one method: same shapes together, under a byte budget.

Leaves come as slices `w[K, N]` (one per layer and expert). Slices of one shape, dtype
and method are solved in chunks of one size, so that each shape compiles once and
scanned and unrolled models run the same program on the same numbers.
"""

import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil, prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from qjax.core.layout import Layout

BATCH_BYTES = 2**28
MOST_SLICES = 64  # each slice of a chunk is an argument of the compiled program


@dataclass(frozen=True)
class Job:
    """A leaf to be solved.

    Attributes:
      path: the leaf's path.
      names: one name per layer, or the path alone.
      read: gives the float leaf, from memory or from disk.
      layout: which of its axes are K and N.
      shape: the leaf's own shape.
      dtype: the leaf's dtype.
      steps: for each name, the number of the method that takes it; None leaves it.
    """

    path: str
    names: tuple[str, ...]
    read: Callable[[], Any]
    layout: Layout
    shape: tuple[int, ...]
    dtype: Any
    steps: tuple[int | None, ...]

    @property
    def slices(self) -> int:
        """Number of matrices in the leaf: layers times experts."""
        return prod(self.shape) // (self.layout.K * self.layout.N)

    @property
    def per_name(self) -> int:
        """Number of matrices (experts) that share a name."""
        return self.slices // len(self.names)

    def wanted(self, step: int | None = None) -> list[int]:
        """The slices that a step takes, or that any step takes."""
        of = [self.steps[i // self.per_name] for i in range(self.slices)]
        return [i for i, s in enumerate(of) if s is not None and step in (None, s)]

    @property
    def weights(self) -> int:
        """Number of weights to be solved."""
        return len(self.wanted()) * self.layout.K * self.layout.N

    def matrices(self, step: int) -> Iterator[tuple[int, Float[Array, "K N"]]]:
        """The slices that a step takes, numbered, one after the other.

        Raises:
            ValueError: naming the leaf (and layer) with NaN or Inf, and how many.
        """
        matrix = self.layout.to_matrix(jnp.asarray(self.read()))
        if matrix.ndim == 2:
            self._check(_non_finite(matrix)[None])
            yield 0, matrix
            return
        matrix = matrix.reshape(-1, *matrix.shape[-2:])
        self._check(_non_finite(matrix))
        for i in self.wanted(step):
            yield i, matrix[i]

    def _check(self, bad: Int[Array, "slices"]) -> None:
        counts = np.asarray(bad).reshape(len(self.names), -1).sum(-1)
        if counts.any():
            worst = int(np.flatnonzero(counts)[0])
            raise ValueError(
                f"{self.names[worst]} holds {counts[worst]} NaN or Inf of "
                f"{prod(self.shape) // len(self.names)} values; quantize finite weights"
            )

    def key(self, key: Any, number: int) -> Any:
        """A key of the slice's own, the same in scanned and unrolled models."""
        layer, expert = divmod(number, self.per_name)
        named = jax.random.fold_in(key, zlib.crc32(self.names[layer].encode()))
        return jax.random.fold_in(named, expert)


@dataclass(frozen=True)
class Piece:
    """A solved slice.

    Attributes:
      parts: the coded parts of the chunk it was solved in, `[chunk, ...]`.
      place: its place in the chunk.
      seconds: its share of the chunk's time, compilation included.
      error: its squared Frobenius error.
      norm: its squared Frobenius norm.
    """

    parts: Any
    place: int
    seconds: float
    error: float
    norm: float


Pieces = dict[int, Piece]


@jax.jit
def _non_finite(w: Float[Array, "... K N"]) -> Int[Array, "..."]:
    return jnp.sum(~jnp.isfinite(w), axis=(-2, -1))


@partial(jax.jit, static_argnums=0)
def solve_chunk(method: Any, slices: Sequence[Any], keys: Any) -> tuple[Any, Any, Any]:
    """Coded parts `[chunk, ...]`, squared error and squared norm of each slice."""
    w = jnp.stack(slices)
    parts = jax.vmap(method.solve)(w, keys) if method.random else method.solve(w)
    exact = w.astype(jnp.float32)
    decoded = sum((part.decode(jnp.float32) for part in parts), start=np.float32(0))
    error = jnp.sum(jnp.square(exact - decoded), axis=(-2, -1))
    return parts, error, jnp.sum(jnp.square(exact), axis=(-2, -1))


def chunk_size(slices: int, K: int, N: int, batch_bytes: int) -> int:
    """Slices per chunk: as many as fit, spread evenly over the chunks there must be.

    >>> chunk_size(10, 256, 256, 4 * 256 * 256 * 4)
    4
    """
    most = min(max(batch_bytes // (4 * K * N), 1), MOST_SLICES)
    return ceil(slices / ceil(slices / most))


def solve_all(
    jobs: Sequence[Job],
    methods: Sequence[Any],
    key: Any,
    batch_bytes: int,
    advance: Callable[[int], None],
) -> Iterator[tuple[Job, Pieces]]:
    """Each job with its solved slices, as soon as all of them are there.

    Args:
      jobs: the leaves.
      methods: the recipe's steps, by the numbers in `Job.steps`.
      key: for methods that draw random numbers.
      batch_bytes: float32 bytes of weights solved at once (at least one slice).
      advance: called with the number of weights solved.
    """
    unfinished: dict[str, Pieces] = {job.path: {} for job in jobs}
    for step, group in _groups(jobs):
        layout = group[0].layout
        total = sum(len(job.wanted(step)) for job in group)
        size = chunk_size(total, layout.K, layout.N, batch_bytes)
        for chunk in _chunks(group, step, size):
            owners = [(job, number) for job, number, _ in chunk]
            for (job, number), piece in zip(
                owners, _solve(methods[step], chunk, size, key)
            ):
                unfinished[job.path][number] = piece
                advance(layout.K * layout.N)
            del chunk
            for job in dict.fromkeys(job for job, _ in owners):
                if len(unfinished[job.path]) == len(job.wanted()):
                    yield job, unfinished.pop(job.path)


Chunk = list[tuple[Job, int, Any]]


def _groups(jobs: Sequence[Job]) -> Iterator[tuple[int, list[Job]]]:
    """Jobs that share shape, dtype and method, by method number."""
    groups: dict[Any, list[Job]] = {}
    for job in jobs:
        for step in sorted({s for s in job.steps if s is not None}):
            group = step, job.layout.K, job.layout.N, jnp.dtype(job.dtype)
            groups.setdefault(group, []).append(job)
    for (step, *_), group in groups.items():
        yield step, group


def _chunks(jobs: Sequence[Job], step: int, size: int) -> Iterator[Chunk]:
    chunk: Chunk = []
    for job in jobs:
        for number, w in job.matrices(step):
            chunk.append((job, number, w))
            del w  # or the leaf would live on while the next one is read
            if len(chunk) == size:
                yield chunk
                chunk = []
    if chunk:
        yield chunk


def _solve(method: Any, chunk: Chunk, size: int, key: Any) -> list[Piece]:
    """Solve a chunk; a short one is filled up with its last slice, not recompiled."""
    start = time.perf_counter()
    filled = chunk + chunk[-1:] * (size - len(chunk))
    keys = None
    if method.random:
        keys = jnp.stack([job.key(key, number) for job, number, _ in filled])
    parts, error, norm = solve_chunk(method, tuple(w for *_, w in filled), keys)
    error, norm = np.asarray(error), np.asarray(norm)
    seconds = (time.perf_counter() - start) / len(chunk)
    return [
        Piece(parts, i, seconds, float(error[i]), float(norm[i]))
        for i in range(len(chunk))
    ]


def gather(job: Job, pieces: Pieces, numbers: Sequence[int]) -> Any:
    """Coded parts of the slices `numbers`, stacked in that order."""
    runs: list[tuple[Any, int, int]] = []
    for piece in (pieces[i] for i in numbers):
        if runs and runs[-1][0] is piece.parts and runs[-1][2] == piece.place:
            runs[-1] = (piece.parts, runs[-1][1], piece.place + 1)
        else:
            runs.append((piece.parts, piece.place, piece.place + 1))
    taken = [jax.tree.map(partial(_take, a, b), parts) for parts, a, b in runs]
    if len(taken) == 1:
        return taken[0]
    return jax.tree.map(lambda *xs: jnp.concatenate(xs), *taken)


def _take(start: int, stop: int, x: Array) -> Array:
    return x if (start, stop) == (0, x.shape[0]) else x[start:stop]
