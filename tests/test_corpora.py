"""Local files and hub names give the same documents, whole or as a stream."""

import gzip
import json
import sys
import types

import pyarrow
import pyarrow.parquet
import pytest

from qjax import corpora

ROWS = [{"text": "one"}, {"text": "two\nlines"}, {"text": "thrée"}]
CHAT = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
]


class Tokenizer:
    """A token per character; marks what it begins itself, and a template's turns."""

    chat_template = "there is one"

    def __call__(self, text, add_special_tokens=True, verbose=True):
        start = [0] if add_special_tokens else []
        return {"input_ids": start + [ord(c) for c in text]}

    def apply_chat_template(self, messages, tokenize):
        assert tokenize is False
        return "".join(f"<{m['role']}>{m['content']}" for m in messages)


@pytest.fixture
def files(tmp_path):
    """The same rows in every kind of file."""
    lines = "\n".join(json.dumps(row) for row in ROWS) + "\n\n"
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write(lines)
    table = pyarrow.Table.from_pylist([row | {"other": 1} for row in ROWS])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    return tmp_path


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.parquet"])
def test_files_hold_rows(files, name, streaming):
    corpus = corpora.load_corpus(files / name, streaming=streaming)
    assert hasattr(corpus.rows, "__len__") != streaming
    for _ in range(2):  # a stream begins anew
        assert list(corpus.rows) == ROWS
    assert corpus.text().text == "one\n\ntwo\nlines\n\nthrée"
    assert corpus.text(characters=4).text == "one\n\ntwo\nlines"


def test_a_text_file_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo", encoding="utf-8")
    assert list(corpora.load_corpus(tmp_path / "a.txt").rows) == [
        {"text": "one\n\ntwo"}
    ]


def test_a_stream_reads_a_file_only_as_far_as_asked(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\nbad\n')
    rows = iter(corpora.load_corpus(tmp_path / "a.jsonl", streaming=True).rows)
    assert next(rows) == {"text": "good"}
    with pytest.raises(ValueError, match="line 2 is no JSON"):
        next(rows)


def test_conversations_and_instructions_are_put_into_the_chat_template():
    tokenizer = Tokenizer()
    rows = [
        {"messages": CHAT, "prompt": "hi"},
        {
            "conversations": [
                {"from": "human", "value": "hi"},
                {"from": "gpt", "value": "hello"},
            ]
        },
        {"instruction": "hi", "input": "", "output": "hello"},
    ]
    encode = corpora.encoder(tokenizer)
    written = "<user>hi<assistant>hello"
    for row in rows:
        assert corpora.row_text(row, tokenizer) == (written, True)
        # The template writes its own special tokens.
        assert encode(row) == [ord(c) for c in written]
    asked = {"instruction": "add", "input": "1 and 2"}
    assert corpora.row_text(asked, tokenizer)[0] == "<user>add\n\n1 and 2"
    assert encode({"text": " a"}) == [0, 32, 97]
    assert corpora.encoder(tokenizer, strip=True)({"text": " a "}) == [0, 97]


def test_rows_that_cannot_be_read_are_named():
    with pytest.raises(ValueError, match="has the columns prompt, expected one of te"):
        corpora.row_text({"prompt": "x"}, Tokenizer())
    turns = {
        "messages": [{"role": "user"}],
        "conversations": [{"from": "human", "value": 3}],
        "instruction": {"a": 1},
    }
    for column, value in turns.items():
        with pytest.raises(ValueError, match=f"a row has {column} with .*, expected"):
            corpora.row_text({column: value}, Tokenizer())
    with pytest.raises(ValueError, match="a row has messages 'hi', expected a list"):
        corpora.row_text({"messages": "hi"}, Tokenizer())
    silent = Tokenizer()
    silent.chat_template = None
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        corpora.row_text({"messages": CHAT}, silent)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"{", "is no JSON"),
        ("a.json", b'{"text": "x"}', "is no list of objects"),
        ("a.json", b'["x"]', "row 1 is no object"),
        ("a.jsonl", b"3\n", "row 1 is no object"),
        ("a.jsonl", b'{"text": "\xff"}', "is damaged"),
        ("a.jsonl.gz", b"not gzip", "is damaged"),
        ("a.jsonl.gz", gzip.compress(b"3" * 99)[:10] + b"\xff" * 30, "is damaged"),
        ("a.txt.gz", gzip.compress(b"3" * 99)[:10] + b"\xff" * 30, "is damaged"),
        ("a.json", b"[" * 100_000, "is no JSON: it is nested too deeply"),
        ("a.jsonl", b"[" * 100_000, "line 1 is no JSON: it is nested too deeply"),
        ("a.txt", b"\xff\xfe", "is damaged"),
        ("a.parquet", b"PAR1 and nothing", "is damaged"),
        ("a.csv", b"text\n", "is of an unknown kind"),
        ("a.parquet.gz", b"", "is of an unknown kind"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        corpora.load_corpus(tmp_path / name)
    assert "\n" not in str(error.value)


def test_unknown_names_and_missing_files(tmp_path):
    with pytest.raises(ValueError, match="neither a file nor one of wikitext2, ptb"):
        corpora.load_corpus("wikitext")
    with pytest.raises(FileNotFoundError, match=r"gone\.jsonl' does not exist"):
        corpora.load_corpus(tmp_path / "gone.jsonl")
    table = pyarrow.Table.from_pylist([{"other": 1}])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="has the columns other, expected one of"):
        corpora.load_corpus(tmp_path / "a.parquet")


def test_names_are_training_data_of_the_hub(monkeypatch, tmp_path):
    asked = {}

    def load_dataset(path, *names, **options):
        asked[path] = (names, options)
        return ROWS

    exceptions = types.SimpleNamespace(DatasetsError=type("E", (Exception,), {}))
    fake = types.SimpleNamespace(load_dataset=load_dataset, exceptions=exceptions)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    monkeypatch.setitem(sys.modules, "datasets.exceptions", exceptions)
    texts = {name: corpora.load_corpus(name).text().text for name in corpora.HUB}
    assert texts["wikitext2"] == "one\n\ntwo\nlines\n\nthrée"
    assert texts["ptb"] == "one two\nlines thrée"
    splits = {path: options["split"] for path, (_, options) in asked.items()}
    assert splits == {
        "Salesforce/wikitext": "train",
        "ptb-text-only/ptb_text_only": "train",
        "allenai/c4": "train",
        "mit-han-lab/pile-val-backup": "validation",
        "HuggingFaceH4/ultrachat_200k": "train_sft",
    }
    for name in ("own/set.v1", "own/set:en", str(tmp_path)):
        assert corpora.load_corpus(name).text().text == texts["wikitext2"]
    assert asked["own/set.v1"] == ((), {"split": "train", "streaming": False})
    assert asked["own/set"][0] == ("en",) and str(tmp_path) in asked
    with pytest.raises(ValueError, match="nor a dataset, owner/name or a folder"):
        corpora.load_corpus("nowhere")
    corpora.load_corpus("c4", streaming=True)
    assert asked["allenai/c4"][1]["streaming"] is True
