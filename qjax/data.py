"""Text to evaluate on, cut into windows of tokens as the papers cut it.

`load_text` gives a named text with its hash; `encode_text` turns it into tokens;
`windows`, `documents` and `split` turn tokens into batches of few shapes, with a
mask that says which tokens count.
"""

import hashlib
import pydoc_data.topics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

C4_WINDOWS = 256  # GPTQ evaluates on the first 256 windows of C4


@dataclass(frozen=True)
class Text:
    """A named text.

    `max_windows`: how many windows of it the protocol evaluates (None: all).
    """

    name: str
    text: str
    max_windows: int | None = None

    @property
    def sha256(self) -> str:
        """Hash of the UTF-8 bytes: results name the exact text by it."""
        return hashlib.sha256(self.text.encode()).hexdigest()


@dataclass(frozen=True)
class Batch:
    """Rows of tokens of one length.

    `mask[b, t]`: token `t` is scored, as predicted from the tokens before it in
    its row. The first token of a row, padding and tokens that serve as context
    only are not.
    """

    tokens: Int[np.ndarray, "rows length"]
    mask: Bool[np.ndarray, "rows length"]


def pydoc_text() -> Text:
    """The language reference that every CPython carries, topics in sorted order.

    It differs between Python versions, hence the hash in every result.
    """
    topics = pydoc_data.topics.topics
    return Text("pydoc", "\n".join(topics[name] for name in sorted(topics)))


def file_text(path: str | Path) -> Text:
    """A UTF-8 text file. Raises FileNotFoundError or ValueError."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"text file {str(path)!r} does not exist")
    try:
        return Text(path.name, path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"text file {str(path)!r} is not UTF-8: {error}") from error


def wikitext2_text() -> Text:
    """WikiText-2 raw, test split, lines joined by blank lines (GPTQ, AWQ)."""
    rows = hub_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split="test")
    return Text("wikitext2", "\n\n".join(rows["text"]))


def ptb_text() -> Text:
    """Penn Treebank, test split, sentences joined by spaces (GPTQ's ptb-new)."""
    # The dataset is a loading script; the hub keeps its rows as parquet here.
    rows = hub_dataset(
        "ptb-text-only/ptb_text_only",
        revision="refs/convert/parquet",
        data_files={"test": "penn_treebank/test/*.parquet"},
        split="test",
    )
    return Text("ptb", " ".join(rows["sentence"]))


def c4_text() -> Text:
    """C4, first 1100 documents of validation shard 0 by spaces (GPTQ's c4-new)."""
    shard = {"validation": "en/c4-validation.00000-of-00008.json.gz"}
    rows = hub_dataset("allenai/c4", data_files=shard, split="validation")
    return Text("c4", " ".join(rows[:1100]["text"]), max_windows=C4_WINDOWS)


TEXTS: dict[str, Callable[[], Text]] = {
    "pydoc": pydoc_text,
    "wikitext2": wikitext2_text,
    "c4": c4_text,
    "ptb": ptb_text,
}


def load_text(name: str) -> Text:
    """A text by name: "pydoc" (offline), "wikitext2", "c4" or "ptb" (`datasets`).

    Raises ValueError for another name, OSError when a dataset cannot be had.

    >>> load_text("pydoc").name
    'pydoc'
    """
    if name not in TEXTS:
        raise ValueError(f"dataset {name!r} is unknown: choose from {', '.join(TEXTS)}")
    return TEXTS[name]()


def hub_dataset(path: str, *names: str, **options: Any) -> Any:
    """What `datasets.load_dataset` gives, or an OSError in one sentence."""
    # Importing it takes seconds and most runs need no dataset.
    import datasets  # noqa: PLC0415
    from datasets.exceptions import DatasetsError  # noqa: PLC0415

    try:
        return datasets.load_dataset(path, *names, **options)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise OSError(
            f"dataset {path!r} is neither cached nor reachable"
            f" ({type(error).__name__}: {reason}): use --text FILE or the pydoc text"
        ) from error


def encode_text(tokenizer: Any, text: Text) -> Int[np.ndarray, " count"]:
    """Tokens of the whole text, with the tokenizer's own special tokens, once.

    The papers tokenise the joined text in one call, so a tokenizer that prepends
    a start token does so only at the very beginning.
    """
    ids = tokenizer(text.text, verbose=False)["input_ids"]
    return np.asarray(ids, dtype=np.int32)


def windows(
    tokens: Int[np.ndarray, " count"],
    length: int,
    stride: int | None = None,
    limit: int | None = None,
) -> Batch:
    """Windows of `length` tokens, all as one `Batch`.

    `stride=None`: the papers' protocol, non-overlapping windows; every token of a
    window but its first is scored, a last partial window is dropped.
    `stride=s`: sliding windows `s` tokens apart; every token but the text's first
    is scored exactly once, with at least `length - s` tokens of context once the
    text is that long; the last window is padded.
    `limit`: keep the first so many windows.

    >>> windows(np.arange(7), 3).tokens.tolist()
    [[0, 1, 2], [3, 4, 5]]
    >>> windows(np.arange(6), 4, stride=3).mask.astype(int).tolist()
    [[0, 1, 1, 1], [0, 1, 1, 0]]
    """
    _check_window(tokens.size, length, stride)
    tokens = tokens.astype(np.int32)
    if stride is None:
        return _nonoverlapping(tokens, length, limit)
    return _sliding(tokens, length, stride, limit)


def _check_window(count: int, length: int, stride: int | None) -> None:
    if length < 2:
        raise ValueError(f"window is {length}: it must be at least 2 tokens")
    if stride is not None and not 1 <= stride < length:
        raise ValueError(f"stride is {stride}: it must be 1 to {length - 1}")
    if count < (length if stride is None else 2):
        raise ValueError(
            f"the text has {count} tokens, fewer than one window of {length}:"
            " take a longer text or a smaller window"
        )


def _nonoverlapping(tokens: np.ndarray, length: int, limit: int | None) -> Batch:
    rows = tokens[: tokens.size // length * length].reshape(-1, length)[:limit]
    mask = np.ones(rows.shape, dtype=bool)
    mask[:, 0] = False
    return Batch(rows, mask)


def _sliding(tokens: np.ndarray, length: int, stride: int, limit: int | None) -> Batch:
    beyond_first = max(0, tokens.size - length)
    starts = np.arange(-(-beyond_first // stride) + 1)[:limit] * stride
    positions = starts[:, None] + np.arange(length)
    inside = positions < tokens.size
    # A window scores what the one before it did not reach.
    fresh = np.arange(length) >= np.where(starts == 0, 1, length - stride)[:, None]
    rows = np.where(inside, tokens[np.minimum(positions, tokens.size - 1)], 0)
    return Batch(rows.astype(np.int32), inside & fresh)


def split(batch: Batch, rows: int) -> Iterator[Batch]:
    """Batches of exactly `rows` rows; the last is filled with masked rows."""
    if rows < 1:
        raise ValueError(f"batch is {rows}: it must be at least 1 row")
    for start in range(0, len(batch.tokens), rows):
        tokens = batch.tokens[start : start + rows]
        fill = ((0, rows - len(tokens)), (0, 0))
        mask = np.pad(batch.mask[start : start + rows], fill)
        yield Batch(np.pad(tokens, fill), mask)


def documents(
    sequences: Sequence[Sequence[int] | np.ndarray],
    buckets: Sequence[int] = (64, 128, 256, 512),
) -> Iterator[Batch]:
    """One `Batch` per bucket length: documents right-padded to few shapes.

    A document goes into the smallest bucket that holds it; one longer than the
    largest bucket is cut there. Empty buckets are skipped; `split` cuts the rest
    into rows.
    """
    buckets = sorted(buckets)
    if not buckets or buckets[0] < 2:
        raise ValueError(f"buckets are {buckets}: give lengths of at least 2 tokens")
    held: dict[int, list[np.ndarray]] = {length: [] for length in buckets}
    for sequence in sequences:
        row = np.asarray(sequence, dtype=np.int32)[: buckets[-1]]
        held[next(length for length in buckets if row.size <= length)].append(row)
    for length, rows in held.items():
        if rows:
            yield _padded(rows, length)


def _padded(rows: list[np.ndarray], length: int) -> Batch:
    sizes = np.array([row.size for row in rows])[:, None]
    columns = np.arange(length)
    tokens = np.stack([np.pad(row, (0, length - row.size)) for row in rows])
    return Batch(tokens, (columns > 0) & (columns < sizes))
