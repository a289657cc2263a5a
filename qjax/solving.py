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
from qjax.core.pytrees import register
from qjax.core.qtensor import QTensor, SiteActs
from qjax.core.transforms import chained
from qjax.methods.base import Solution, solution_of

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
    def experts(self) -> tuple[int, ...]:
        """Sizes of the batched axes of one layer."""
        own = len(self.shape) - len(self.layout.roles)
        return tuple(self.shape[own + i] for i in self.layout.axes("b"))

    @property
    def slices_per_layer(self) -> int:
        """Number of matrices (experts) in one layer of the leaf."""
        layers = prod(self.shape[: len(self.shape) - len(self.layout.roles)])
        return self.slices // layers

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
        return jax.random.fold_in(site_key(key, self.names[layer]), expert)


def site_key(key: Any, name: str) -> Any:
    """A key of the site's own, the same in scanned and unrolled models."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


@dataclass(frozen=True)
class Solved:
    """A solved slice, or a chunk of them with an axis in front; a pytree.

    Attributes:
      solution: what the method found.
      scale, zero, global_scale: the static range of the site's input, if it has one.
      t_in: the transform of the input that was there before the method.
    """

    solution: Solution
    scale: Any = None
    zero: Any = None
    global_scale: Any = None
    t_in: Any = None


register(Solved, ("solution", "scale", "zero", "global_scale", "t_in"))


def tensor_of(solved: Solved, layout: Layout, dtype: Any, method: Any) -> QTensor:
    """The quantized leaf, or one layer of it, that was solved."""
    found = solved.solution
    t_in = chained(solved.t_in, found.t_in)
    record = SiteActs(
        solved.scale,
        solved.zero,
        t_in,
        activation=method.activation,
        global_scale=solved.global_scale,
    )
    plain = t_in is None and method.activation is None
    return QTensor.of(
        found.parts,
        layout,
        dtype,
        () if plain else (record,),
        left=found.left,
        right=found.right,
        sparse=found.sparse,
        bias=found.bias,
    )


@dataclass(frozen=True)
class Piece:
    """A solved slice, where it is and what is known of it.

    Attributes:
      solved: the chunk it was solved in.
      place: its place in the chunk.
      seconds: its share of the chunk's time, compilation included.
      error: its squared Frobenius error.
      norm: its squared Frobenius norm.
    """

    solved: Solved
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
    """What was solved `[chunk, ...]`, squared error and norm of each slice."""
    w = jnp.stack(slices)
    found = jax.vmap(method.solve)(w, keys) if method.random else method.solve(w)
    solution = solution_of(found)
    return Solved(solution), *weight_error(w, solution)


def weight_error(w: Float[Array, "... K N"], solution: Solution) -> Any:
    """Squared Frobenius error and norm of each slice."""
    exact = w.astype(jnp.float32)
    error = jnp.sum(jnp.square(exact - solution.decoded()), axis=(-2, -1))
    return error, jnp.sum(jnp.square(exact), axis=(-2, -1))


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
    solved, error, norm = solve_chunk(method, tuple(w for *_, w in filled), keys)
    error, norm = np.asarray(error), np.asarray(norm)
    seconds = (time.perf_counter() - start) / len(chunk)
    return [
        Piece(solved, i, seconds, float(error[i]), float(norm[i]))
        for i in range(len(chunk))
    ]


def gather(pieces: Pieces, numbers: Sequence[int]) -> Solved:
    """What was solved of the slices `numbers`, stacked in that order."""
    runs: list[tuple[Any, int, int]] = []
    for piece in (pieces[i] for i in numbers):
        if runs and runs[-1][0] is piece.solved and runs[-1][2] == piece.place:
            runs[-1] = (piece.solved, runs[-1][1], piece.place + 1)
        else:
            runs.append((piece.solved, piece.place, piece.place + 1))
    taken = [jax.tree.map(partial(_take, a, b), x) for x, a, b in runs]
    if len(taken) == 1:
        return taken[0]
    return jax.tree.map(lambda *xs: jnp.concatenate(xs), *taken)


def _take(start: int, stop: int, x: Array) -> Array:
    return x if (start, stop) == (0, x.shape[0]) else x[start:stop]
