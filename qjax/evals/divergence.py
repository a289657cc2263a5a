"""How far a quantized model's predictions are from full precision.

`KL = mean over tokens of sum_v p_v log(p_v / q_v)` in nats, `p` from the reference
and `q` from the candidate; top-1 agreement is the share of tokens where both rank
the same token first. Both models read each batch once, in one pass.
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

from qjax.data import Batch
from qjax.evals.perplexity import (
    NONOVERLAP,
    LanguageModel,
    Protocol,
    Scores,
    Sums,
    next_token_sums,
    total,
)

Model = tuple[LanguageModel, Any]  # (f, params)


class PairSums(NamedTuple):
    """Totals over scored tokens of a reference and a candidate."""

    kl: Float[Array, ""] | float
    agreements: Int[Array, ""] | int
    reference: Sums
    candidate: Sums


@dataclass(frozen=True)
class Divergence:
    """One comparison on one text.

    `kl`: nats per token; `seconds` and `tokens_per_second`: the candidate's forward
    passes, without compilation; `run_bytes`: what its compiled program reserves for
    one batch (weights, temporaries and logits), as XLA's memory analysis counts.
    """

    protocol: Protocol
    kl: float
    top1_agreement: float
    reference: Scores
    candidate: Scores
    tokens: int
    seconds: float
    tokens_per_second: float
    run_bytes: int


def token_kl(
    reference: Float[Array, "*B V"], candidate: Float[Array, "*B V"]
) -> Float[Array, "*B"]:
    """KL(reference || candidate) in nats from logits, in float32."""
    log_p = jax.nn.log_softmax(reference.astype(jnp.float32), axis=-1)
    log_q = jax.nn.log_softmax(candidate.astype(jnp.float32), axis=-1)
    p = jnp.exp(log_p)
    # A token that the reference rules out adds nothing, whatever the candidate says.
    return jnp.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)


def pair_sums(
    reference: Float[Array, "B T V"],
    candidate: Float[Array, "B T V"],
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
) -> PairSums:
    """Totals over the tokens `mask` marks, from both models' logits."""
    scored = mask[:, 1:]
    kl = token_kl(reference[:, :-1], candidate[:, :-1])
    same = jnp.argmax(reference[:, :-1], -1) == jnp.argmax(candidate[:, :-1], -1)
    return PairSums(
        jnp.where(scored, kl, 0.0).sum(),
        (same & scored).sum(),
        next_token_sums(reference, tokens, mask),
        next_token_sums(candidate, tokens, mask),
    )


def divergence(
    reference: Model,
    candidate: Model,
    tokens: Int[np.ndarray, " count"],
    protocol: Protocol = NONOVERLAP,
    *,
    progress: bool = True,
) -> Divergence:
    """Compare two models, each `(f, params)`, over a text's tokens.

    Raises ValueError when the text is shorter than a window or the vocabularies differ.
    """
    return Yardstick(reference, tokens, protocol).measure(candidate, progress=progress)


class Yardstick:
    """A reference and a text, compiled once, for any number of candidates.

    The reference's logits are kept for the next candidate if all of them take at most
    `keep_bytes`; else each candidate's pass runs the reference again. Raises ValueError
    when the text is shorter than a window.
    """

    def __init__(
        self,
        reference: Model,
        tokens: Int[np.ndarray, " count"],
        protocol: Protocol = NONOVERLAP,
        keep_bytes: int = 2**29,
    ):
        self.protocol = protocol
        self.batches = protocol.batches(tokens)
        self._params = reference[1]
        self._reference = compile_forward(reference, self.batches[0])
        self._sums = jax.jit(pair_sums)
        logits = self._reference.out_info
        whole = logits.size * logits.dtype.itemsize * len(self.batches)
        self._kept: dict[int, Array] | None = {} if whole <= keep_bytes else None

    def measure(
        self,
        candidate: Model,
        *,
        progress: bool = True,
        advance: Callable[[], None] = lambda: None,
    ) -> Divergence:
        """Both models over the whole text, each batch once.

        `advance` is called after each batch, for a caller with a progress bar of its
        own (then `progress=False`). Raises ValueError when the vocabularies differ.
        """
        run = compile_forward(candidate, self.batches[0])
        _check_vocabularies(self._reference, run)
        sums, seconds = [], 0.0
        bar = track(self.batches, "divergence", disable=not progress)
        for number, batch in enumerate(bar):
            p = self._logits(number, batch)
            began = time.perf_counter()
            q = jax.block_until_ready(run(candidate[1], batch.tokens))
            seconds += time.perf_counter() - began
            sums.append(jax.block_until_ready(self._sums(p, q, *_inputs(batch))))
            advance()
        return _summary(self.protocol, sums, seconds, program_bytes(run))

    def _logits(self, number: int, batch: Batch) -> Array:
        """The reference's logits for a batch."""
        if self._kept is not None and number in self._kept:
            return self._kept[number]
        logits = jax.block_until_ready(self._reference(self._params, batch.tokens))
        if self._kept is not None:
            self._kept[number] = logits
        return logits


def _inputs(batch: Batch) -> tuple[Array, Array]:
    return jnp.asarray(batch.tokens), jnp.asarray(batch.mask)


def compile_forward(model: Model, batch: Batch) -> jax.stages.Compiled:
    """The model's forward pass, compiled for this batch's shape."""
    f, params = model
    return jax.jit(lambda p, x: f(p, x)).lower(params, batch.tokens).compile()


def program_bytes(compiled: jax.stages.Compiled) -> int:
    """Arguments, outputs and temporaries of a compiled program, in bytes."""
    memory = compiled.memory_analysis()
    if memory is None:
        raise ValueError("this backend gives no memory analysis of a program")
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
    )


def _check_vocabularies(*programs: jax.stages.Compiled) -> None:
    first, second = (program.out_info.shape[-1] for program in programs)
    if first != second:
        raise ValueError(
            f"the models' vocabularies differ: {first} and {second} tokens"
        )


def _summary(
    protocol: Protocol,
    sums: Sequence[PairSums],
    seconds: float,
    run_bytes: int,
) -> Divergence:
    reference = total([part.reference for part in sums])
    count = int(reference.scored)
    read = protocol.batch * protocol.window * len(sums)
    return Divergence(
        protocol=protocol,
        kl=math.fsum(float(part.kl) for part in sums) / count,
        top1_agreement=sum(int(part.agreements) for part in sums) / count,
        reference=Scores.of(reference),
        candidate=Scores.of(total([part.candidate for part in sums])),
        tokens=count,
        seconds=seconds,
        tokens_per_second=read / seconds,
        run_bytes=run_bytes,
    )
