"""Decoding with a key-value cache, for any function that follows the protocol."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


def generate(
    f: Callable[..., Any],
    params: Any,
    tokens: Int[Array, "B T"],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    key: Any = None,
    mask: Bool[Array, "B T"] | None = None,
) -> Int[Array, "B S"]:
    """Continue every sequence: one pass over the prompt, then token by token.

    The protocol: `f(params, tokens, cache, mask=) -> (logits, cache)`, and
    `f.init_cache(batch, length, dtype)`. `qjax.apply(f)` follows it when `f` does.

    Args:
      f: the function; compiled once per function and shape.
      params: its parameters, quantized or not.
      tokens: the prompts; pad on the left, and say so in `mask`.
      max_new_tokens: how many tokens to add; end tokens do not stop it.
      temperature: 0 takes the likeliest token, else logits are divided by it and
        sampled.
      key: for sampling; needed when `temperature` is not 0.
      mask: False on padding.

    Returns:
      Prompts and continuations, `[B, T + max_new_tokens]`.

    Raises:
      TypeError: `f` has no cache.
      ValueError: an argument is out of range.
    """
    if not callable(getattr(f, "init_cache", None)):
        raise TypeError(
            f"generate needs f.init_cache(batch, length, dtype), {f} has none"
        )
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}, expected at least 1")
    if temperature < 0:
        raise ValueError(f"temperature is {temperature}, expected 0 or more")
    if temperature > 0 and key is None:
        raise ValueError("key is None, but sampling at a temperature needs one")
    key = jax.random.key(0) if key is None else key
    mask = jnp.ones(tokens.shape, bool) if mask is None else mask
    greedy = temperature == 0
    scale = jnp.float32(1.0 if greedy else temperature)
    return _generate(f, max_new_tokens, greedy, params, tokens, mask, scale, key)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _generate(f, count, greedy, params, tokens, mask, temperature, key):
    def pick(logits, key):
        if greedy:
            return jnp.argmax(logits[:, -1], axis=-1).astype(tokens.dtype)
        scaled = logits[:, -1].astype(jnp.float32) / temperature
        return jax.random.categorical(key, scaled).astype(tokens.dtype)

    def step(carry, key):
        token, cache = carry
        logits, cache = f(params, token[:, None], cache)
        token = pick(logits, key)
        return (token, cache), token

    batch, length = tokens.shape
    dtype = jax.eval_shape(f, params, tokens).dtype
    cache = f.init_cache(batch, length + count, dtype)
    logits, cache = f(params, tokens, cache, mask=mask)
    keys = jax.random.split(key, count)
    first = pick(logits, keys[0])
    _, rest = jax.lax.scan(step, (first, cache), keys[1:])
    return jnp.concatenate([tokens, first[:, None], rest.T], axis=1)
