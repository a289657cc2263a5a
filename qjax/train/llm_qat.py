"""LLM-QAT (Liu et al., Findings of ACL 2024): training on what the float model writes.

https://arxiv.org/abs/2305.17888, "Data-free distillation". Rows start at a token drawn
at random; the next few tokens are the likeliest, the rest are sampled from the float
model. The quantized model then learns its distribution of every next token,

    L = - mean_i sum_c p_T(c | x_<=i) log p_S(c | x_<=i).

Use it with any step of `fake_quantize`; the paper's has symmetric ranges without
clipping, `StraightThrough`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from qjax.models.generate import generate

GREEDY = 4  # "the first 3-5 tokens"


def distillation_loss(
    logits: Float[Array, "rows T V"], teacher: Float[Array, "rows T V"]
) -> Float[Array, ""]:
    """Mean cross-entropy from the teacher's distributions, in nats.

    At its least, where the two agree, it is the teacher's mean entropy. No gradient
    reaches the teacher.
    """
    wide = jax.lax.stop_gradient(teacher.astype(jnp.float32))
    scores = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    return -jnp.mean(jnp.sum(jax.nn.softmax(wide, axis=-1) * scores, axis=-1))


def generated_rows(
    f: Callable[..., Any],
    params: Any,
    vocabulary: int,
    count: int,
    length: int,
    key: Any,
    *,
    greedy: int = GREEDY,
    batch: int = 32,
) -> Int[np.ndarray, "count length"]:
    """Rows of tokens that a model writes.

    Args:
      f: `f(params, tokens)` with a cache, as `qjax.generate` needs it.
      params: its parameters.
      vocabulary: first tokens are drawn from `[0, vocabulary)`, each equally likely.
      count, length: how many rows, of how many tokens.
      key: of everything drawn; the same key gives the same rows.
      greedy: how many tokens after the first are the likeliest ones; 3 to 5 in the
        paper.
      batch: rows made at a time.

    Raises:
      TypeError: `f` has no cache.
      ValueError: an argument is out of range.
    """
    for name, value, least in (
        ("vocabulary", vocabulary, 1),
        ("count", count, 1),
        ("batch", batch, 1),
        ("greedy", greedy, 0),
        ("length", length, greedy + 2),
    ):
        if value < least:
            raise ValueError(f"{name} is {value}, expected at least {least}")
    first, sampled = jax.random.split(key)
    shape = (-(-count // batch) * batch, 1)
    starts = jax.random.randint(first, shape, 0, vocabulary, jnp.int32)
    rows = []
    for number, start in enumerate(jnp.split(starts, shape[0] // batch)):
        head = generate(f, params, start, greedy) if greedy else start
        own, left = jax.random.fold_in(sampled, number), length - head.shape[1]
        rows.append(generate(f, params, head, left, temperature=1.0, key=own))
    return np.concatenate(jax.device_get(rows))[:count]
