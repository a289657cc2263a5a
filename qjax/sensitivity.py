"""How much each site suffers from each of several quantizers.

One function per measure, in the table `SENSITIVITIES`; each gives `[sites, candidates]`
in units of its own, comparable from site to site:

- "weights": `|W - Q|^2`, without data;
- "hessian": the squared error of the site's output over the calibration tokens,
  `tr(D^T (sum x x^T) D)` with `D = W - Q`, inputs as the full-precision model has them;
- "kl": `KL(p || q)` of the function's outputs, read as logits, with this site alone
  quantized, in nats per token.

Weights are what is measured: formats of activations do not count. A method that needs
data is represented by rounding to nearest in its format.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.core.lazy import LazyLeaf
from qjax.core.qtensor import is_quantized
from qjax.core.statistics import Hessian
from qjax.leaves import Leaves
from qjax.methods.base import solution_of
from qjax.solving import Job
from qjax.trace.marks import Marks
from qjax.trace.paths import flatten_with_paths
from qjax.trace.program import Program, is_arraylike, trace
from qjax.trace.rows import Accumulator, Seen, finalized, refusal
from qjax.trace.stream import LeafKey, Point, Stream, find_points, lanes_of

Row = tuple[str, int]
"""A leaf's path, and which of its names."""


@dataclass(frozen=True)
class Question:
    """What is to be measured.

    Attributes:
      f, params: the function and its float parameters.
      jobs: the leaves; `Job.steps` says which of their names count.
      candidates: the quantizers; None leaves the site in float.
      batches: calibration data, each a tuple of `f`'s inputs.
      mask_fn: token weights of a batch.
      tokens: of how many tokens a measure with many forward passes makes use.
    """

    f: Callable[..., Any]
    params: Any
    jobs: Sequence[Job]
    candidates: tuple[Any, ...]
    batches: Sequence[tuple[Any, ...]]
    mask_fn: Callable[..., Any] | None
    tokens: int

    @property
    def rows(self) -> list[Row]:
        """The sites, in the order of the table."""
        return [
            (job.path, i)
            for job in self.jobs
            for i, step in enumerate(job.steps)
            if step is not None
        ]

    def mask(self, batch: tuple[Any, ...]) -> Any:
        """The token weights of a batch; None where all count."""
        return None if self.mask_fn is None else self.mask_fn(*batch)


def rounded(method: Any, w: Any) -> Any:
    """`Q` of `w[..., K, N]`, float32; a method that needs data rounds to nearest."""
    if hasattr(method, "solve"):
        return solution_of(method.solve(w)).decoded()
    grid = method.format.fit(w)
    return method.format.from_codes(method.format.to_codes(w, grid), grid)


def of_weights(question: Question) -> np.ndarray:
    """`|W - Q|^2`."""
    errors = [
        [0.0 if c is None else float(_weight_error(c, w)) for c in question.candidates]
        for job in question.jobs
        for _, w in _layers(job)
    ]
    return np.asarray(errors)


@partial(jax.jit, static_argnums=0)
def _weight_error(method: Any, w: Any) -> Any:
    return jnp.sum(jnp.square(w.astype(jnp.float32) - rounded(method, w)))


def _layers(job: Job) -> Iterator[tuple[int, Any]]:
    """The matrices `w[slices, K, N]` of each name that counts, leaf read once."""
    matrix = job.layout.to_matrix(jnp.asarray(job.read()))
    matrix = matrix.reshape(len(job.names), job.per_name, *matrix.shape[-2:])
    for i, step in enumerate(job.steps):
        if step is not None:
            yield i, matrix[i]


def of_outputs(question: Question) -> np.ndarray:
    """`tr(D^T (sum x x^T) D)`; a Hessian lives as long as the pass is at its point."""
    by_path = {job.path: job for job in question.jobs}
    errors = {row: np.zeros(len(question.candidates)) for row in question.rows}
    unseen = set(errors)
    for paths, leaves, point, seen in _points(question, by_path):
        h = finalized({"hessian": Hessian()}, seen)["hessian"]
        for key in point.keys:
            job = by_path[paths[key[0]]]
            row = job.path, _name_number(job, key)
            w = job.layout.to_matrix(leaves.read(key))
            unseen.discard(row)
            errors[row] += [
                0.0 if c is None else float(_output_error(c, w, h, seen.tokens))
                for c in question.candidates
            ]
    if unseen:
        path, i = min(unseen)
        raise ValueError(
            f"calibration does not reach {by_path[path].names[i]}; ignore it, or take "
            'sensitivity="weights"'
        )
    return np.stack([errors[row] for row in question.rows])


@partial(jax.jit, static_argnums=0)
def _output_error(method: Any, w: Any, h: Any, tokens: Any) -> Any:
    delta = w.astype(jnp.float32) - rounded(method, w)
    through = jnp.matmul(h, delta, precision="highest")
    return jnp.sum(tokens * jnp.sum(delta * through, axis=(-2, -1)))


def _name_number(job: Job, key: LeafKey) -> int:
    """Which of the job's names a layer has; one name may stand for all layers."""
    if len(job.names) == 1:
        return 0
    sizes = job.shape[: len(job.shape) - len(job.layout.roles)]
    return int(np.ravel_multi_index(key[1], sizes))


def _points(
    question: Question, by_path: dict[str, Job]
) -> Iterator[tuple[tuple[str, ...], Leaves, Point, Seen]]:
    """Every point of the full-precision stream, with the Hessian of its input."""

    def traced(batch: Any) -> Program:
        return trace(question.f, question.params, batch)

    lanes = lanes_of(traced, question.batches)
    paths = lanes[0].program.paths

    def wanted(key: LeafKey) -> bool:
        job = by_path.get(paths[key[0]])
        if job is None or len(key[1]) != len(job.shape) - len(job.layout.roles):
            return False
        return job.steps[_name_number(job, key)] is not None

    def name(key: LeafKey) -> str:
        job = by_path[paths[key[0]]]
        return job.names[_name_number(job, key)]

    leaves = Leaves(lanes[0].program.leaves)
    stream = Stream(lanes, find_points(lanes, wanted, name), leaves.read)
    marks = Marks(stream, [question.mask(batch) for batch in question.batches])
    stream.start(
        [[x for x in jax.tree.leaves(b) if is_arraylike(x)] for b in question.batches],
        marks.kept,
    )
    accumulator = Accumulator()
    for point in stream:
        if not refusal(point.meetings[0]):
            yield paths, leaves, point, _hessian(accumulator, marks, point)


def _hessian(accumulator: Accumulator, marks: Marks, point: Point) -> Seen:
    asked = {"hessian": Hessian()}
    seen = accumulator.init(asked, point.meetings[0])
    for number, op, x, full, rest in marks.stream.inputs(point):
        mask, _ = marks.take(number, op, x, rest)
        seen = accumulator.update(asked, op, seen, x, full, rest, mask)
    bad = int(np.sum(np.asarray(seen.bad)))
    if bad:
        raise ValueError(
            f"the input of {point.names[0]} holds {bad} NaN or Inf in calibration; "
            "calibrate with inputs for which the model is finite"
        )
    return seen


def of_logits(question: Question) -> np.ndarray:
    """`KL(p || q)` per token, one forward pass for each site and candidate."""
    rows = question.rows
    place = {row: number for number, row in enumerate(rows)}
    names, leaves = zip(*flatten_with_paths(question.params))
    held = [x.read() if isinstance(x, LazyLeaf) else x for x in leaves]
    tree = jax.tree.structure(question.params, is_leaf=is_quantized)
    forward = jax.jit(lambda leaves, batch: _logits(question.f, tree, leaves, batch))
    total, count = np.zeros((len(rows), len(question.candidates))), 0.0
    for batch in _leading(question, forward, held):
        logits = forward(held, batch)
        weight = _token_weights(question.mask(batch), logits)
        count += float(weight.sum())
        for job in question.jobs:
            number = names.index(job.path)
            for i, c, leaf in _replaced(job, held[number], question.candidates):
                moved = forward([*held[:number], leaf, *held[number + 1 :]], batch)
                found = _weighted_kl(logits, moved, weight)
                total[place[job.path, i], c] += float(found)
    return total / max(count, 1.0)


def _logits(f: Any, tree: Any, leaves: Any, batch: Any) -> Any:
    outputs = jax.tree.leaves(f(jax.tree.unflatten(tree, leaves), *batch))
    if len(outputs) != 1 or outputs[0].ndim < 1:
        raise ValueError(
            f'sensitivity="kl" reads the function\'s output as logits, but it has '
            f'{len(outputs)} outputs; take sensitivity="hessian"'
        )
    return outputs[0].astype(jnp.float32)


def _leading(question: Question, forward: Any, held: Any) -> Iterator[tuple[Any, ...]]:
    """The first batches, until there are tokens enough."""
    seen = 0
    for batch in question.batches:
        if seen >= question.tokens:
            return
        yield batch
        seen += prod(jax.eval_shape(forward, held, batch).shape[:-1])


def _token_weights(mask: Any, logits: Any) -> Any:
    if mask is None:
        return jnp.ones(logits.shape[:-1])
    if mask.size != prod(logits.shape[:-1]):
        raise ValueError(
            f"the mask has {mask.size} elements, but there are logits for "
            f"{prod(logits.shape[:-1])} tokens"
        )
    return jnp.asarray(mask, jnp.float32).reshape(logits.shape[:-1])


def _replaced(
    job: Job, leaf: Any, candidates: Sequence[Any]
) -> Iterator[tuple[int, int, Any]]:
    """Name, candidate and the leaf with this name alone rounded."""
    whole = job.layout.to_matrix(jnp.asarray(leaf))
    flat = whole.reshape(len(job.names), job.per_name, *whole.shape[-2:])
    for i, step in enumerate(job.steps):
        for c, method in enumerate(candidates):
            if step is not None and method is not None:
                new = flat.at[i].set(_rounded(method, flat[i]).astype(flat.dtype))
                yield i, c, job.layout.from_matrix(new.reshape(whole.shape))


_rounded = partial(jax.jit, static_argnums=0)(rounded)


@jax.jit
def _weighted_kl(reference: Any, candidate: Any, weight: Any) -> Any:
    log_p = jax.nn.log_softmax(reference)
    log_q = jax.nn.log_softmax(candidate)
    p = jnp.exp(log_p)
    # What the reference rules out adds nothing, whatever the candidate says.
    each = jnp.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)
    return jnp.sum(each * weight)


SENSITIVITIES: dict[str, Callable[[Question], np.ndarray]] = {
    "weights": of_weights,
    "hessian": of_outputs,
    "kl": of_logits,
}
NEED_DATA = frozenset({"hessian", "kl"})
