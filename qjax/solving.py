"""Many matrices, one method: same shapes together, under a byte budget.

Leaves come as slices `w[K, N]` (one per layer and expert). Slices of one shape, dtype
and method are solved in chunks of one size, so that each shape compiles once and
scanned and unrolled models run the same program on the same numbers. In formats with a
second scale, slices with one input are solved side by side, and share it: servers run
them as one linear with one such scale.
"""

import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from math import ceil, prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from qjax.core.layout import Layout
from qjax.core.pytrees import register
from qjax.core.qtensor import QTensor, SiteActs
from qjax.core.sweep import second_scale
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
      inputs: for each name, a key of the activation that it meets. Sites of equal keys
        have one input.
    """

    path: str
    names: tuple[str, ...]
    read: Callable[[], Any]
    layout: Layout
    shape: tuple[int, ...]
    dtype: Any
    steps: tuple[int | None, ...]
    inputs: tuple[Any, ...]

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

    def matrices(self, numbers: Sequence[int]) -> Iterator[Float[Array, "K N"]]:
        """The slices of these numbers, one after the other.

        Raises:
            ValueError: naming the leaf (and layer) with NaN or Inf, and how many.
        """
        matrix = self.layout.to_matrix(jnp.asarray(self.read()))
        if matrix.ndim == 2:
            self._check(_non_finite(matrix)[None])
            yield matrix
            return
        matrix = matrix.reshape(-1, *matrix.shape[-2:])
        self._check(_non_finite(matrix))
        for i in numbers:
            yield matrix[i]

    def _check(self, bad: Int[Array, "slices"]) -> None:
        each = prod(self.shape) // len(self.names)
        refuse_non_finite(self.names, bad, each, "quantize finite weights")

    def input(self, number: int) -> Any:
        """What slices have in common that may be solved side by side."""
        layer, expert = divmod(number, self.per_name)
        return self.inputs[layer], expert, self.layout.K, jnp.dtype(self.dtype)

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


def refuse_non_finite(names: Sequence[str], bad: Any, each: int, remedy: str) -> None:
    """Refuse a leaf with NaN or Inf.

    Args:
      names: its layers.
      bad: how many there are in each of its slices, in the layers' order.
      each: values of a layer.
      remedy: what to do instead.

    Raises:
        ValueError: naming the first such layer, and how many.
    """
    counts = np.asarray(bad).reshape(len(names), -1).sum(-1)
    if counts.any():
        worst = int(np.flatnonzero(counts)[0])
        raise ValueError(
            f"{names[worst]} holds {counts[worst]} NaN or Inf of {each} values; "
            f"{remedy}"
        )


@jax.jit
def _non_finite(w: Float[Array, "... K N"]) -> Int[Array, "..."]:
    return jnp.sum(~jnp.isfinite(w), axis=(-2, -1))


def solved_as_one(method: Any) -> bool:
    """Whether matrices with one input are solved side by side.

    A method that draws random numbers draws them for each matrix alone, where no second
    scale is shared.
    """
    drawn = method.random and not second_scale(method.format)
    return getattr(method, "shared", False) and not drawn


@partial(jax.jit, static_argnums=0)
def solve_chunk(
    method: Any, rows: Sequence[Sequence[Any]], keys: Any
) -> list[tuple[Any, Any, Any]]:
    """What was solved `[chunk, ...]`, squared error and norm of each slice.

    One of the three for each of the slices that stand side by side in every row.
    """
    ws = [jnp.stack(slices) for slices in zip(*rows)]
    w = jnp.concatenate(ws, axis=-1)
    found = jax.vmap(method.solve)(w, keys) if method.random else method.solve(w)
    solutions = [solution_of(found)]
    if len(ws) > 1:
        solutions = solutions[0].split([w.shape[-1] for w in ws])
    return [(Solved(s), *weight_error(w, s)) for w, s in zip(ws, solutions)]


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
    for step, group in _groups(jobs, methods):
        K, widths = group[0].jobs[0].layout.K, [j.layout.N for j in group[0].jobs]
        total = sum(len(bundle.rows) for bundle in group)
        size = chunk_size(total, K, sum(widths), batch_bytes)
        for chunk in _chunks(group, size):
            owners = [members for members, _ in chunk]
            pieces = _solve(methods[step], chunk, size, key)
            del chunk
            for (job, number), piece in zip(chain(*owners), chain(*pieces)):
                unfinished[job.path][number] = piece
                advance(K * job.layout.N)
            for job in dict.fromkeys(job for job, _ in chain(*owners)):
                if len(unfinished[job.path]) == len(job.wanted()):
                    yield job, unfinished.pop(job.path)


Owners = tuple[tuple[Job, int], ...]
Chunk = list[tuple[Owners, tuple[Any, ...]]]


@dataclass(frozen=True)
class Bundle:
    """Slices to be solved: in every row one of each job, side by side."""

    jobs: tuple[Job, ...]
    rows: tuple[tuple[int, ...], ...]

    @property
    def shapes(self) -> tuple[Any, ...]:
        """Sizes and dtype of the slices of a row."""
        each = ((job.layout, jnp.dtype(job.dtype)) for job in self.jobs)
        return tuple((layout.K, layout.N, dtype) for layout, dtype in each)


def _bundles(jobs: Sequence[Job], step: int, method: Any) -> list[Bundle]:
    """The slices that a step takes; side by side where they share a second scale."""
    joined = second_scale(method.format) and solved_as_one(method)
    rows: dict[Any, list[tuple[Job, int]]] = {}
    for job in jobs:
        for number in job.wanted(step):
            row = job.input(number) if joined else (job.path, number)
            rows.setdefault(row, []).append((job, number))
    bundles: dict[tuple[Job, ...], list[tuple[int, ...]]] = {}
    for row in rows.values():
        owners, numbers = zip(*row)
        bundles.setdefault(owners, []).append(numbers)
    return [Bundle(owners, tuple(each)) for owners, each in bundles.items()]


def _groups(
    jobs: Sequence[Job], methods: Sequence[Any]
) -> Iterator[tuple[int, list[Bundle]]]:
    """Slices that share shape, dtype and method, by method number."""
    groups: dict[Any, list[Bundle]] = {}
    for step in sorted({s for job in jobs for s in job.steps if s is not None}):
        for bundle in _bundles(jobs, step, methods[step]):
            groups.setdefault((step, bundle.shapes), []).append(bundle)
    for (step, _), group in groups.items():
        yield step, group


def _chunks(bundles: Sequence[Bundle], size: int) -> Iterator[Chunk]:
    chunk: Chunk = []
    for bundle in bundles:
        taken = zip(bundle.jobs, zip(*bundle.rows))
        readers = [job.matrices(numbers) for job, numbers in taken]
        for row in bundle.rows:
            ws = tuple(next(reader) for reader in readers)
            chunk.append((tuple(zip(bundle.jobs, row)), ws))
            del ws  # or the leaf would live on while the next one is read
            if len(chunk) == size:
                yield chunk
                chunk = []
        del readers
    if chunk:
        yield chunk


def _solve(method: Any, chunk: Chunk, size: int, key: Any) -> list[tuple[Piece, ...]]:
    """Solve a chunk; a short one is filled up with its last row, not recompiled."""
    start = time.perf_counter()
    filled = chunk + chunk[-1:] * (size - len(chunk))
    keys = None
    if method.random:
        keys = jnp.stack([job.key(key, number) for ((job, number), *_), _ in filled])
    solved = solve_chunk(method, tuple(ws for _, ws in filled), keys)
    found = [(s, np.asarray(error), np.asarray(norm)) for s, error, norm in solved]
    seconds = (time.perf_counter() - start) / (len(chunk) * len(found))
    return [
        tuple(Piece(s, i, seconds, float(e[i]), float(n[i])) for s, e, n in found)
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
