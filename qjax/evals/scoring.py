"""Log likelihoods of continuations: `sum_t log p(y_t | context, y_<t)`.

Rows of similar length go through the model together, longest first, in batches of one
size and few lengths, so that few programs are compiled. Continuations that differ in
their last token alone (the letters of multiple choice) share a row.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from rich.progress import track

SHORTEST = 32


class Continuation(NamedTuple):
    """Tokens to score and the tokens before them; neither is empty."""

    context: tuple[int, ...]
    tokens: tuple[int, ...]


class Likelihood(NamedTuple):
    """`total`: in nats; `greedy`: whether each token is the likeliest at its place."""

    total: float
    greedy: bool


class _Row(NamedTuple):
    """What the model reads, and of how many of its outputs tokens are scored."""

    read: tuple[int, ...]
    scored: int


class _Scores(NamedTuple):
    """Of each row, every scored token but the last; and the last one's choices."""

    total: Float[Array, " B"]
    greedy: Bool[Array, " B"]
    last: Float[Array, "B V"]


def lengths(longest: int) -> tuple[int, ...]:
    """Lengths that rows are padded to: 32, 48, 64, 96, 128, 192, ... and `longest`.

    At most a third of a row of more than 32 tokens is padding.

    >>> lengths(100)
    (32, 48, 64, 96, 100)
    """
    found, step = [], SHORTEST
    while step < longest:
        found += [n for n in (step, step + step // 2) if n < longest]
        step *= 2
    return (*found, longest)


def padded_length(count: int, longest: int) -> int:
    """The least of `lengths(longest)` that holds so many tokens."""
    return next(n for n in lengths(longest) if n >= count)


def log_likelihoods(
    f: Callable[..., Any],
    params: Any,
    continuations: Sequence[Continuation],
    longest: int,
    *,
    batch: int = 8,
    progress: bool = True,
) -> list[Likelihood]:
    """The log likelihood of every continuation after its context, in float32.

    A row that is too long loses tokens on the left: the model reads the last `longest`
    of all tokens but the last, as lm-evaluation-harness's `hf` adapter has it.

    Args:
      f: `f(params, tokens[B, T]) -> logits[B, T, V]`, causal; compiled at most once for
        each of `lengths(longest)`.
      params: its parameters, quantized or not (then `f` is `qjax.apply(f)`).
      continuations: what to score.
      longest: tokens that the model reads at once.
      batch: rows a batch.
      progress: whether to show a bar.

    Returns:
      In the order of `continuations`.

    Raises:
      ValueError: a context or a continuation is empty, or a continuation longer than
        `longest`; or `batch` is not positive.
    """
    if batch < 1:
        raise ValueError(f"batch is {batch}: it must be at least 1 row")
    waiting: dict[_Row, list[int]] = {}
    for number, each in enumerate(continuations):
        waiting.setdefault(_row(each, longest), []).append(number)
    rows = sorted(waiting, key=lambda row: (-len(row.read), row.read))
    groups = [rows[i : i + batch] for i in range(0, len(rows), batch)]
    found: list[Likelihood] = [Likelihood(0.0, False)] * len(continuations)
    for group in track(groups, "scoring", disable=not progress):
        filled = [*group, *group[:1] * (batch - len(group))]
        scores = _run(f, params, filled, padded_length(len(group[0].read), longest))
        for row, (total, greedy, last) in zip(group, _by_row(scores)):
            best = int(last.argmax())
            for number in waiting[row]:
                token = continuations[number].tokens[-1]
                found[number] = Likelihood(
                    float(total + last[token]), bool(greedy and token == best)
                )
    return found


def _row(each: Continuation, longest: int) -> _Row:
    if not each.context or not each.tokens:
        raise ValueError("a context or a continuation to score has no tokens")
    if len(each.tokens) > longest:
        raise ValueError(
            f"a continuation has {len(each.tokens)} tokens, but the model reads "
            f"{longest}"
        )
    tokens = (*each.context, *each.tokens)
    return _Row(tokens[-(longest + 1) :][:-1], len(each.tokens))


def _run(f: Any, params: Any, rows: Sequence[_Row], length: int) -> _Scores:
    tokens = np.stack([np.pad(row.read, (0, length - len(row.read))) for row in rows])
    ends = np.array([len(row.read) for row in rows])
    begins = ends - np.array([row.scored for row in rows])
    return jax.device_get(_score(f, params, tokens.astype(np.int32), begins, ends))


def _by_row(scores: _Scores) -> Iterator[tuple[Any, Any, Any]]:
    return zip(scores.total, scores.greedy, scores.last)


@functools.partial(jax.jit, static_argnums=0)
def _score(
    f: Callable[..., Any],
    params: Any,
    tokens: Int[Array, "B T"],
    begins: Int[Array, " B"],
    ends: Int[Array, " B"],
) -> _Scores:
    """Scores from the logits at positions `begins` to `ends - 1` of every row."""
    logits = f(params, tokens).astype(jnp.float32)
    place = jnp.arange(tokens.shape[1] - 1)
    inner = (place >= begins[:, None]) & (place < ends[:, None] - 1)
    targets, guesses = tokens[:, 1:], logits[:, :-1]
    chosen = jnp.take_along_axis(guesses, targets[..., None], axis=-1)[..., 0]
    logp = chosen - jax.nn.logsumexp(guesses, axis=-1)
    right = jnp.argmax(guesses, axis=-1) == targets
    last = jnp.take_along_axis(logits, ends[:, None, None] - 1, axis=1)[:, 0]
    return _Scores(
        jnp.where(inner, logp, 0.0).sum(-1),
        (right | ~inner).all(-1),
        jax.nn.log_softmax(last, axis=-1),
    )
