"""Documents to calibrate with: by name from the hub, or from local files.

A corpus is its rows as they are stored; `encoder` makes tokens of one, putting
conversations and instructions into the tokenizer's chat template. `qjax.cuts` cuts
them. Evaluate on other texts (`qjax.data`): these are training splits.
"""

import gzip
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qjax.data import Text, hub_dataset
from qjax.io.jsontext import parse_json

Row = Mapping[str, Any]
TEXT, JSON, LINES = (".txt", ".md"), (".json",), (".jsonl", ".ndjson")
PARQUET = (".parquet",)
FILES = (*TEXT, *JSON, *LINES, *PARQUET)
DATASET = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")
# ShareGPT's names of who speaks, and those of chat templates.
SPEAKERS = {"human": "user", "gpt": "assistant", "chatgpt": "assistant"}
COLUMNS = ("text", "sentence", "messages", "conversations", "instruction")
# What reading a damaged file raises: no UTF-8, cut off, no gzip, or no deflated data.
DAMAGE = (UnicodeDecodeError, EOFError, gzip.BadGzipFile, zlib.error)
WANTED = (*COLUMNS, "input", "output")


@dataclass(frozen=True)
class Corpus:
    """Documents of one origin.

    `rows` is a sequence, or, streamed, an iterable that begins anew each time; `joint`
    stands between documents where a paper joins them.
    """

    name: str
    rows: Iterable[Row]
    joint: str = "\n\n"

    def text(self, tokenizer: Any = None, characters: int | None = None) -> Text:
        """Documents as one text, all or until they have so many characters.

        Conversations need the tokenizer.
        """
        parts: list[str] = []
        for row in self.rows:
            if characters is not None and characters <= 0:
                break
            parts.append(row_text(row, tokenizer)[0])
            characters = None if characters is None else characters - len(parts[-1])
        return Text(self.name, self.joint.join(parts))


@dataclass(frozen=True)
class _Lines:
    """The rows of a file, read anew each time it is iterated."""

    path: Path
    read: Callable[[Path], Iterator[Row]]

    def __iter__(self) -> Iterator[Row]:
        return self.read(self.path)


def load_corpus(name: str | Path, *, streaming: bool = False) -> Corpus:
    """A corpus by name, or the documents of a local file.

    Names: "wikitext2" and "ptb" (training splits), "c4" (training shard 0), "pile"
    (AWQ's copy of the validation split), "ultrachat" (200k conversations). Files: .txt
    (one document), .jsonl, .json (a list) and .parquet, with a column `text`,
    `messages`, `conversations` (ShareGPT) or `instruction` (with `input` and `output`);
    .gz of the first three. Any other dataset: a folder that `datasets` reads or its
    name on the hub, "owner/name" or "owner/name:configuration", of which the training
    split is taken.

    Args:
      name: the name or path.
      streaming: read rows as they are asked for, in place of all at once.

    Raises:
      FileNotFoundError, OSError: there is no such file, or the hub is out of reach.
      ValueError: the name or the kind of file is unknown, or the file is damaged.
    """
    path = Path(name)
    if path.is_file():
        lines = _Lines(path, _reader(path))
        return Corpus(path.name, lines if streaming else list(lines))
    if str(name) in HUB:
        made, joint = HUB[str(name)]
        return Corpus(str(name), made(streaming), joint)
    if path.suffix in (*FILES, ".gz") and not path.is_dir():
        raise FileNotFoundError(f"corpus file {str(path)!r} does not exist")
    if path.is_dir() or DATASET.fullmatch(str(name)):
        own = [str(name)] if path.is_dir() else str(name).split(":")
        rows = hub_dataset(*own, split="train", streaming=streaming)
        return Corpus(str(name), rows)
    raise ValueError(
        f"corpus {str(name)!r} is neither a file nor one of {', '.join(HUB)}, nor a "
        "dataset, owner/name or a folder"
    )


def _wikitext2(streaming: bool) -> Any:
    name = ("Salesforce/wikitext", "wikitext-2-raw-v1")
    return hub_dataset(*name, split="train", streaming=streaming)


def _ptb(streaming: bool) -> Any:
    return hub_dataset(
        "ptb-text-only/ptb_text_only",
        revision="refs/convert/parquet",
        data_files={"train": "penn_treebank/train/*.parquet"},
        split="train",
        streaming=streaming,
    )


def _c4(streaming: bool) -> Any:
    shard = {"train": "en/c4-train.00000-of-01024.json.gz"}
    return hub_dataset(
        "allenai/c4", data_files=shard, split="train", streaming=streaming
    )


def _pile(streaming: bool) -> Any:
    return hub_dataset(
        "mit-han-lab/pile-val-backup", split="validation", streaming=streaming
    )


def _ultrachat(streaming: bool) -> Any:
    return hub_dataset(
        "HuggingFaceH4/ultrachat_200k", split="train_sft", streaming=streaming
    )


HUB: dict[str, tuple[Callable[[bool], Any], str]] = {
    "wikitext2": (_wikitext2, "\n\n"),
    "ptb": (_ptb, " "),
    "c4": (_c4, " "),
    "pile": (_pile, "\n\n"),
    "ultrachat": (_ultrachat, "\n\n"),
}


def row_text(row: Row, tokenizer: Any = None) -> tuple[str, bool]:
    """A row's text, and whether a chat template wrote it.

    Raises:
      ValueError: the row has none of the known columns, or holds a conversation and the
        tokenizer has no chat template.
    """
    for column in ("text", "sentence"):
        if isinstance(row.get(column), str):
            return row[column], False
    messages = _messages(row)
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(
            "the rows are conversations, but the tokenizer has no chat template to "
            "write them with"
        )
    return tokenizer.apply_chat_template(messages, tokenize=False), True


def _messages(row: Row) -> list[dict[str, Any]]:
    """A row's conversation, in the names of chat templates."""
    if row.get("messages"):
        return [
            {"role": turn["role"], "content": turn["content"]}
            for turn in _turns("messages", row["messages"], ("role", "content"))
        ]
    if row.get("conversations"):
        return [
            {"role": SPEAKERS.get(turn["from"], turn["from"]), "content": turn["value"]}
            for turn in _turns("conversations", row["conversations"], ("from", "value"))
        ]
    if row.get("instruction"):
        names = ("instruction", "input", "output")
        said = {name: row.get(name) or "" for name in names}
        _turns("instruction", [said], names)
        asked = "\n\n".join(x for x in (said["instruction"], said["input"]) if x)
        turns = [{"role": "user", "content": asked}]
        if said["output"]:
            turns.append({"role": "assistant", "content": said["output"]})
        return turns
    raise ValueError(
        f"a row has the columns {', '.join(map(str, row))}, expected one of "
        f"{', '.join(COLUMNS)}"
    )


def _turns(column: str, turns: Any, names: Sequence[str]) -> Sequence[Any]:
    """The turns of a conversation, each with a text under every name.

    Raises:
      ValueError: one is something else.
    """
    if not isinstance(turns, Sequence) or isinstance(turns, str):
        raise ValueError(f"a row has {column} {turns!r}, expected a list of turns")
    for turn in turns:
        whole = isinstance(turn, Mapping)
        if not whole or not all(isinstance(turn.get(name), str) for name in names):
            raise ValueError(
                f"a row has {column} with {turn!r}, expected texts under "
                f"{' and '.join(names)}"
            )
    return turns


def encoder(tokenizer: Any, *, strip: bool = False) -> Callable[[Row], list[int]]:
    """What makes tokens of a row.

    A chat template writes its own special tokens; other texts get the tokenizer's.

    Args:
      tokenizer: of transformers.
      strip: whether white space around a text is dropped, as AWQ does.
    """

    def encode(row: Row) -> list[int]:
        text, chat = row_text(row, tokenizer)
        text = text.strip() if strip else text
        found = tokenizer(text, add_special_tokens=not chat, verbose=False)
        return found["input_ids"]

    return encode


def _reader(path: Path) -> Callable[[Path], Iterator[Row]]:
    kind = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    readers = ((TEXT, _whole), (JSON, _list), (LINES, _lines), (PARQUET, _parquet))
    for endings, read in readers:
        if kind in endings and not (read is _parquet and path.suffix == ".gz"):
            return read
    raise ValueError(
        f"corpus file {str(path)!r} is of an unknown kind: give .txt, .json, .jsonl or "
        ".parquet"
    )


def _open(path: Path) -> Any:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    return path.open(encoding="utf-8")


def _whole(path: Path) -> Iterator[Row]:
    try:
        with _open(path) as file:
            yield {"text": file.read()}
    except DAMAGE as error:
        raise ValueError(f"corpus file {str(path)!r} is damaged: {error}") from error


def _list(path: Path) -> Iterator[Row]:
    for text in _whole(path):
        found = parse_json(text["text"], f"corpus file {str(path)!r}")
        if not isinstance(found, list):
            raise ValueError(f"corpus file {str(path)!r} is no list of objects")
        yield from (_object(path, i, row) for i, row in enumerate(found, 1))


def _lines(path: Path) -> Iterator[Row]:
    try:
        with _open(path) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    where = f"corpus file {str(path)!r}: line {number}"
                    yield _object(path, number, parse_json(line, where))
    except DAMAGE as error:
        raise ValueError(f"corpus file {str(path)!r} is damaged: {error}") from error


def _object(path: Path, number: int, row: Any) -> Row:
    if not isinstance(row, dict):
        raise ValueError(f"corpus file {str(path)!r}: row {number} is no object")
    return row


def _parquet(path: Path) -> Iterator[Row]:
    # Here, because importing it takes a second and few uses need it.
    import pyarrow  # noqa: PLC0415
    import pyarrow.parquet  # noqa: PLC0415

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            columns = [name for name in names if name in WANTED]
            if not columns:
                raise ValueError(
                    f"corpus file {str(path)!r} has the columns {', '.join(names)}, "
                    f"expected one of {', '.join(COLUMNS)}"
                )
            for part in file.iter_batches(columns=columns):
                yield from part.to_pylist()
    except (pyarrow.ArrowInvalid, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"corpus file {str(path)!r} is damaged: {reason}") from error
