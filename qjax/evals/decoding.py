"""Continuations of prompts until each says enough, a few tokens at a time.

`qjax.models.generate` makes a fixed number of tokens in one program; here the host
looks at the tokens now and then, so that answers of a line do not cost a page.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from rich.progress import track

from qjax.evals.scoring import padded_length

Tokens = Sequence[int]
LOOK = 16


def continue_until(
    f: Callable[..., Any],
    params: Any,
    prompts: Sequence[Tokens],
    done: Callable[[Tokens], bool],
    longest: int,
    count: int,
    *,
    batch: int = 8,
    temperature: float = 0.0,
    key: Any = None,
    look: int = LOOK,
    progress: bool = True,
) -> list[list[int]]:
    """The tokens after each prompt: `count` of them, or fewer if all rows are done.

    A prompt keeps its last `longest - count` tokens, as in lm-evaluation-harness's
    `hf` adapter, and is padded on the left to one of `lengths(longest - count)`.

    Args:
      f: with `f.init_cache`, as `qjax.models.generate` needs it; two programs are
        compiled at most for each length.
      params: its parameters.
      prompts: none of them empty.
      done: whether a row's new tokens suffice; asked every `look` tokens.
      longest: tokens that the model reads at once.
      count: the most tokens to add.
      batch: prompts a batch; the longest go first.
      temperature: 0 takes the likeliest token.
      key: for sampling.
      look: tokens between looks.
      progress: whether to show a bar.

    Returns:
      In the order of `prompts`; what follows a row's end is not cut off.

    Raises:
      TypeError: `f` has no cache.
      ValueError: a prompt is empty, or `count` leaves no room for it; a number is out
        of range.
    """
    _check(f, prompts, longest, count, batch, temperature, key)
    room = longest - count
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    groups = [order[i : i + batch] for i in range(0, len(order), batch)]
    key = jax.random.key(0) if key is None else key
    found: list[list[int]] = [[] for _ in prompts]
    for number, group in enumerate(track(groups, "writing", disable=not progress)):
        rows = [list(prompts[i])[-room:] for i in group]
        rows += rows[:1] * (batch - len(rows))
        tokens, mask = _left_padded(rows, padded_length(len(rows[0]), room))
        slots = tokens.shape[1] + -(-count // look) * look
        logits, cache = _begin(f, slots, params, tokens, mask)
        new = np.zeros((batch, 0), np.int32)
        while new.shape[1] < count and not all(done(row) for row in new.tolist()):
            step = jax.random.fold_in(jax.random.fold_in(key, number), new.shape[1])
            heat = jnp.float32(temperature)
            logits, cache, more = _more(f, look, params, logits, cache, heat, step)
            new = np.concatenate([new, np.asarray(more)], axis=1)
        for i, row in zip(group, new[:, :count].tolist()):
            found[i] = row
    return found


def _check(f, prompts, longest, count, batch, temperature, key) -> None:
    if not callable(getattr(f, "init_cache", None)):
        raise TypeError(
            f"decoding needs f.init_cache(batch, length, dtype), {f} has none"
        )
    if not all(len(prompt) for prompt in prompts):
        raise ValueError("a prompt has no tokens")
    if not 1 <= count < longest:
        raise ValueError(
            f"{count} tokens are to be added, but the model reads {longest}, prompt "
            f"included: ask for 1 to {longest - 1}"
        )
    if batch < 1:
        raise ValueError(f"batch is {batch}: it must be at least 1 row")
    if temperature < 0:
        raise ValueError(f"temperature is {temperature}, expected 0 or more")
    if temperature > 0 and key is None:
        raise ValueError("key is None, but sampling at a temperature needs one")


def _left_padded(
    rows: Sequence[Tokens], length: int
) -> tuple[Int[np.ndarray, "B T"], Bool[np.ndarray, "B T"]]:
    tokens = np.stack([np.pad(row, (length - len(row), 0)) for row in rows])
    sizes = np.array([[len(row)] for row in rows])
    return tokens.astype(np.int32), np.arange(length) >= length - sizes


@functools.partial(jax.jit, static_argnums=(0, 1))
def _begin(f, slots, params, tokens, mask):
    """The logits after the prompts, and a cache with room for what follows."""
    dtype = jax.eval_shape(f, params, tokens).dtype
    cache = f.init_cache(tokens.shape[0], slots, dtype)
    logits, cache = f(params, tokens, cache, mask=mask)
    return logits[:, -1], cache


@functools.partial(jax.jit, static_argnums=(0, 1))
def _more(f, count, params, logits, cache, temperature, key):
    """So many more tokens `[B, count]`, after the logits and the cache behind them."""

    def step(carry, key):
        token = _pick(carry[0], temperature, key)
        logits, cache = f(params, token[:, None], carry[1])
        return (logits[:, -1], cache), token

    keys = jax.random.split(key, count)
    (logits, cache), tokens = jax.lax.scan(step, (logits, cache), keys)
    return logits, cache, tokens.T


def _pick(
    logits: Float[Array, "B V"], temperature: Float[Array, ""], key: Any
) -> Int[Array, " B"]:
    logits = logits.astype(jnp.float32)
    heat = jnp.where(temperature > 0, temperature, 1.0)
    drawn = jax.random.categorical(key, logits / heat)
    best = jnp.argmax(logits, axis=-1)
    return jnp.where(temperature > 0, drawn, best).astype(jnp.int32)
