"""Calibration texts cut into rows of tokens, each way as its paper's code cuts them.

| cut | used by | rows |
|---|---|---|
| `random_windows` | GPTQ on WikiText-2 and PTB | at random places of the joined text |
| `document_windows` | GPTQ on C4 | at a random place of a random long document |
| `blocks` | AWQ on the Pile | short documents joined, then cut side by side |
| `first_documents` | SmoothQuant, llm-compressor | the first documents, truncated |

Where the reference draws, the same seed draws the same rows. `rows` are what
`qjax.corpora` reads; `encode` makes tokens of one.
"""

import itertools
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

Encode = Callable[[Any], Sequence[int]]
Rows = Any  # a sequence, or a `datasets.Dataset`, which has a length and items only


def random_windows(
    tokens: Int[np.ndarray, " count"],
    samples: int = 128,
    length: int = 2048,
    seed: int = 0,
) -> Int[np.ndarray, "samples length"]:
    """Windows that begin anywhere in a text, as in GPTQ (`datautils.get_wikitext2`).

    They may overlap. The joined text's very last token is in none.

    >>> random_windows(np.arange(9), samples=2, length=4).tolist()
    [[3, 4, 5, 6], [3, 4, 5, 6]]

    Raises:
      ValueError: the text is not longer than a window, or a number is not positive.
    """
    _positive(samples=samples, length=length)
    if tokens.size <= length:
        raise ValueError(
            f"the text has {tokens.size} tokens, which is not more than a window of "
            f"{length}: take a longer text or a smaller window"
        )
    draw = random.Random(seed)
    begins = [draw.randint(0, tokens.size - length - 1) for _ in range(samples)]
    return np.stack([tokens[i : i + length] for i in begins]).astype(np.int32)


def document_windows(
    rows: Rows,
    encode: Encode,
    samples: int = 128,
    length: int = 2048,
    seed: int = 0,
) -> Int[np.ndarray, "samples length"]:
    """A window of a random document, as in GPTQ (`datautils.get_c4`).

    A document that is not longer than a window is drawn again. (The reference takes one
    of exactly a window's length, and fails on it.)

    Raises:
      ValueError: no document is longer than a window, or a number is not positive.
    """
    _positive(samples=samples, length=length)
    draw = random.Random(seed)
    short: set[int] = set()
    found = []
    while len(found) < samples:
        if len(short) == len(rows):
            raise ValueError(
                f"none of {len(rows)} documents has more than {length} tokens: take a "
                "smaller window"
            )
        number = draw.randint(0, len(rows) - 1)
        tokens = () if number in short else encode(rows[number])
        if len(tokens) <= length:
            short.add(number)
            continue
        begin = draw.randint(0, len(tokens) - length - 1)
        found.append(tokens[begin : begin + length])
    return np.array(found, np.int32)


def blocks(
    rows: Iterable[Any],
    encode: Encode,
    samples: int = 128,
    length: int = 512,
    longest: int = 512,
) -> Int[np.ndarray, "blocks length"]:
    """Whole documents joined and cut side by side, as in AWQ (`get_calib_dataset`).

    The reference shuffles first: give it `shuffled(rows, 42)`, and an `encode` that
    strips white space.

    Args:
      rows: the documents; read until there are enough.
      encode: makes tokens of one.
      samples: how many documents are joined.
      length: tokens in a block; a last part of a block is dropped.
      longest: documents with more tokens, and empty ones, are left out.

    Raises:
      ValueError: the documents do not fill a block, or a number is not positive.
    """
    _positive(samples=samples, length=length, longest=longest)
    kept = (tokens for tokens in map(encode, rows) if 0 < len(tokens) <= longest)
    joined = [token for tokens in itertools.islice(kept, samples) for token in tokens]
    count = len(joined) // length
    if not count:
        raise ValueError(
            f"the documents of at most {longest} tokens have {len(joined)} in all, "
            f"which fills no block of {length}"
        )
    return np.array(joined[: count * length], np.int32).reshape(count, length)


def first_documents(
    rows: Iterable[Any], encode: Encode, samples: int = 512, length: int = 512
) -> list[np.ndarray]:
    """The first documents, each truncated, as in SmoothQuant (`get_act_scales`).

    SmoothQuant shuffles first, `shuffled(rows, 42)`; llm-compressor's examples shuffle
    the first `samples` documents. `padded` makes batches of the rows.

    Raises:
      ValueError: there is no document with a token, or a number is not positive.
    """
    _positive(samples=samples, length=length)
    cut = (np.array(encode(row)[:length], np.int32) for row in rows)
    found = [row for row in itertools.islice(cut, samples) if row.size]
    if not found:
        raise ValueError("there is no document with a token in it")
    return found


def shuffled(rows: Rows, seed: int = 42) -> Iterable[Any]:
    """Rows in the order that `datasets.Dataset.shuffle(seed)` gives them."""
    order = np.random.default_rng(seed).permutation(len(rows))
    return (rows[int(i)] for i in order)


def padded(
    rows: Sequence[np.ndarray],
    vocabulary: int,
    batch: int = 8,
    buckets: Sequence[int] = (64, 128, 256, 512),
) -> tuple[
    list[tuple[np.ndarray]], Callable[[Int[Any, "B T"]], Bool[np.ndarray, "B T"]]
]:
    """Batches `(tokens,)` of few lengths, and the `mask_fn` that leaves padding out.

    Padding is a token that no row holds, so that the mask follows from the tokens.

    Raises:
      ValueError: the rows hold every token of the vocabulary, or one is longer than the
        largest bucket.
    """
    used = np.unique(np.concatenate(list(rows)))
    free = np.setdiff1d(np.arange(vocabulary), used)
    if not free.size:
        raise ValueError(
            f"the rows hold all {vocabulary} tokens of the vocabulary, so that none is "
            "left for padding: take fewer rows"
        )
    longest = max(row.size for row in rows)
    if longest > max(buckets):
        raise ValueError(
            f"a row has {longest} tokens, more than the largest bucket, {max(buckets)}"
        )
    marker = int(free[0])
    batches = []
    for length, held in _by_bucket(rows, buckets).items():
        for start in range(0, len(held), batch):
            tokens = np.full((batch, length), marker, np.int32)
            for line, row in zip(tokens, held[start : start + batch]):
                line[: row.size] = row
            batches.append((tokens,))
    return batches, lambda tokens: np.asarray(tokens) != marker


def _by_bucket(
    rows: Sequence[np.ndarray], buckets: Sequence[int]
) -> dict[int, list[np.ndarray]]:
    """Rows by the smallest bucket that holds them, the first bucket first."""
    held: dict[int, list[np.ndarray]] = {}
    for row in sorted(rows, key=lambda row: row.size):
        fitting = min(length for length in buckets if length >= row.size)
        held.setdefault(fitting, []).append(row)
    return held


def _positive(**numbers: int) -> None:
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"{name} is {value}: it must be at least 1")
