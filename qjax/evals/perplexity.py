"""Perplexity and next-token accuracy of a language model on a text.

`PPL = exp(mean over scored tokens t of -log p(x_t | x_<t))`. Two protocols, named
in every result:

- "nonoverlap": windows side by side, the one of GPTQ, AWQ and most papers;
- "sliding": windows `stride` apart, each token scored once with a long context.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from rich.progress import track

from qjax.data import Batch, split, windows

LanguageModel = Callable[..., Any]  # f(params, tokens[B, T]) -> logits[B, T, V]


class Sums(NamedTuple):
    """Totals over scored tokens: negative log likelihood (nats), hits, their number."""

    nll: Float[Array, ""] | float
    hits: Int[Array, ""] | int
    scored: Int[Array, ""] | int


@dataclass(frozen=True)
class Scores:
    """`nll`: nats per token; `accuracy`: share of next tokens ranked first."""

    nll: float
    perplexity: float
    accuracy: float

    @classmethod
    def of(cls, sums: Sums) -> "Scores":
        """Means of the totals."""
        nll = float(sums.nll) / int(sums.scored)
        perplexity = math.exp(nll) if nll < 700 else math.inf
        return cls(nll, perplexity, int(sums.hits) / int(sums.scored))


@dataclass(frozen=True)
class Protocol:
    """How a text was cut. `window` and `stride` in tokens, `batch` in windows."""

    window: int = 512
    stride: int | None = None
    batch: int = 8
    max_windows: int | None = None

    @property
    def name(self) -> str:
        """ "nonoverlap" or "sliding"."""
        return "nonoverlap" if self.stride is None else "sliding"

    def batches(self, tokens: Int[np.ndarray, " count"]) -> Sequence[Batch]:
        """Batches of one shape. Raises ValueError for a text that is too short."""
        cut = windows(tokens, self.window, self.stride, self.max_windows)
        return tuple(split(cut, self.batch))


NONOVERLAP = Protocol()


@dataclass(frozen=True)
class Perplexity:
    """One evaluation. `seconds` and `tokens_per_second` exclude compilation."""

    protocol: Protocol
    scores: Scores
    tokens: int
    seconds: float
    tokens_per_second: float


def next_token_sums(
    logits: Float[Array, "B T V"],
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
) -> Sums:
    """Totals over the tokens `mask` marks, each predicted from the one before it.

    In float32 whatever the logits' dtype.
    """
    logits = logits[:, :-1].astype(jnp.float32)
    targets, scored = tokens[:, 1:], mask[:, 1:]
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    nll = jax.nn.logsumexp(logits, axis=-1) - chosen
    hits = (jnp.argmax(logits, axis=-1) == targets) & scored
    return Sums(jnp.where(scored, nll, 0.0).sum(), hits.sum(), scored.sum())


def total(sums: Sequence[Sums]) -> Sums:
    """Sum over batches, on the host in double precision."""
    return Sums(
        math.fsum(float(part.nll) for part in sums),
        sum(int(part.hits) for part in sums),
        sum(int(part.scored) for part in sums),
    )


def perplexity(
    f: LanguageModel,
    params: Any,
    tokens: Int[np.ndarray, " count"],
    protocol: Protocol = NONOVERLAP,
    *,
    progress: bool = True,
) -> Perplexity:
    """Perplexity of `f(params, tokens[B, T]) -> logits[B, T, V]` on a text's tokens.

    One compilation, one pass. Raises ValueError when the text is shorter than a
    window.
    """
    batches = protocol.batches(tokens)
    step = jax.jit(lambda p, x, mask: next_token_sums(f(p, x), x, mask))
    compiled = step.lower(params, batches[0].tokens, batches[0].mask).compile()
    began = time.perf_counter()
    sums = total(
        [
            jax.block_until_ready(compiled(params, batch.tokens, batch.mask))
            for batch in track(
                batches, f"perplexity ({protocol.name})", disable=not progress
            )
        ]
    )
    seconds = time.perf_counter() - began
    read = protocol.batch * protocol.window * len(batches)
    return Perplexity(
        protocol, Scores.of(sums), int(sums.scored), seconds, read / seconds
    )
