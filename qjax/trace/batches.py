"""Batches as they are given: each a tuple of `f`'s inputs."""

from collections.abc import Iterable
from typing import Any

from qjax.trace.program import is_arraylike


def as_batch(batch: Any, name: str) -> tuple[Any, ...]:
    """A batch as a tuple.

    Args:
      batch: a tuple or list of inputs.
      name: what the caller calls it, for the message.

    Raises:
      TypeError: it is neither. A bare array is not taken for its rows.
    """
    if isinstance(batch, (tuple, list)):
        return tuple(batch)
    kind = "an array" if is_arraylike(batch) else f"of type {type(batch).__name__}"
    raise TypeError(
        f"{name} is {kind}; each batch is a tuple of f's inputs: write (x,) for one"
    )


def as_batches(batches: Iterable[Any] | None) -> list[tuple[Any, ...]]:
    """All batches as tuples; none of None.

    Raises:
      TypeError: one of them is no tuple; it is named by its number.
    """
    every = enumerate(() if batches is None else batches)
    return [as_batch(batch, f"batches[{number}]") for number, batch in every]
