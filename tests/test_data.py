"""Texts are cut as the papers cut them; windows score every token once."""

import hashlib
import pydoc_data.topics
import sys
import types

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qjax import data


class CharTokenizer:
    """One token per character, after a start token 0."""

    def __call__(self, text, verbose=True):
        return {"input_ids": [0, *(ord(c) for c in text)]}


class Rows(dict):
    """A `datasets` split, which also slices to a dict of lists."""

    def __getitem__(self, key):
        if isinstance(key, slice):
            return {name: column[key] for name, column in self.items()}
        return super().__getitem__(key)


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for `datasets` that records what was asked of it."""
    calls = []
    tables = {
        "Salesforce/wikitext": Rows(text=["", " = A = \n", "b"]),
        "ptb-text-only/ptb_text_only": Rows(sentence=["no it was n't", "<unk> n"]),
        "allenai/c4": Rows(text=[f"doc {i}" for i in range(1200)]),
    }

    def load_dataset(path, *names, **options):
        calls.append((path, names, options))
        return tables[path]

    exceptions = types.SimpleNamespace(DatasetsError=type("E", (Exception,), {}))
    fake = types.SimpleNamespace(load_dataset=load_dataset, exceptions=exceptions)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    monkeypatch.setitem(sys.modules, "datasets.exceptions", exceptions)
    return calls


def test_pydoc_text_is_cpythons_reference():
    text = data.load_text("pydoc")
    topics = pydoc_data.topics.topics
    assert text.text.startswith(topics[min(topics)])
    assert len(text.text) == sum(map(len, topics.values())) + len(topics) - 1
    assert text.sha256 == hashlib.sha256(text.text.encode()).hexdigest()


def test_wikitext2_is_the_raw_test_split_joined_by_blank_lines(hub):
    assert data.load_text("wikitext2").text == "\n\n = A = \n\n\nb"
    [(path, names, options)] = hub
    assert (path, names) == ("Salesforce/wikitext", ("wikitext-2-raw-v1",))
    assert options == {"split": "test"}


def test_ptb_is_the_test_split_joined_by_spaces(hub):
    assert data.load_text("ptb").text == "no it was n't <unk> n"
    assert hub[0][2]["split"] == "test"


def test_c4_is_1100_documents_of_the_first_validation_shard(hub):
    text = data.load_text("c4")
    assert text.text.split(" doc ")[-1] == "1099"
    assert text.max_windows == 256
    assert hub[0][2]["data_files"] == {
        "validation": "en/c4-validation.00000-of-00008.json.gz"
    }


def test_an_unreachable_dataset_is_one_sentence(hub, monkeypatch):
    def refuse(*args, **kwargs):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(sys.modules["datasets"], "load_dataset", refuse)
    with pytest.raises(OSError, match="'allenai/c4' is neither cached nor") as caught:
        data.load_text("c4")
    assert "\n" not in str(caught.value)


def test_unknown_dataset_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"'lambada' is unknown.*wikitext2, c4, ptb"):
        data.load_text("lambada")


def test_file_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("héllo", encoding="utf-8")
    assert data.file_text(path) == data.Text("a.txt", "héllo")
    path.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ValueError, match="is not UTF-8"):
        data.file_text(path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        data.file_text(tmp_path / "b.txt")


def test_text_is_encoded_in_one_call():
    tokens = data.encode_text(CharTokenizer(), data.Text("t", "ab"))
    assert tokens.tolist() == [0, 97, 98]
    assert tokens.dtype == np.int32


@given(st.integers(2, 90), st.integers(2, 12))
def test_nonoverlapping_windows_tile_the_text(count, length):
    tokens = np.arange(count)
    if count < length:
        with pytest.raises(ValueError, match=f"has {count} tokens"):
            data.windows(tokens, length)
        return
    cut = data.windows(tokens, length)
    kept = count // length * length
    assert cut.tokens.ravel().tolist() == list(range(kept))
    assert cut.mask.sum() == kept // length * (length - 1)
    assert not cut.mask[:, 0].any()


@given(st.integers(2, 90), st.integers(2, 12), st.data())
def test_sliding_windows_score_every_token_but_the_first_once(count, length, draw):
    stride = draw.draw(st.integers(1, length - 1))
    cut = data.windows(np.arange(count), length, stride)
    assert sorted(cut.tokens[cut.mask].tolist()) == list(range(1, count))
    rows, columns = np.nonzero(cut.mask)
    later = rows > 0
    assert (columns[later] >= length - stride).all()
    starts = cut.tokens[:, :1]
    inside = np.arange(length) + starts < count
    assert (np.diff(cut.tokens)[inside[:, 1:]] == 1).all()


def test_limit_keeps_the_first_windows():
    assert data.windows(np.arange(100), 10, limit=3).tokens.shape == (3, 10)
    assert data.windows(np.arange(100), 10, 5, limit=3).tokens.shape == (3, 10)


@pytest.mark.parametrize(
    ("length", "stride", "message"),
    [(1, None, "window is 1"), (8, 0, "stride is 0"), (8, 8, "stride is 8")],
)
def test_bad_windows_are_named(length, stride, message):
    with pytest.raises(ValueError, match=message):
        data.windows(np.arange(50), length, stride)


@given(st.integers(1, 20), st.integers(1, 6))
def test_split_keeps_one_shape_and_masks_what_it_adds(windows, rows):
    whole = data.windows(np.arange(windows * 4), 4)
    parts = list(data.split(whole, rows))
    assert {part.tokens.shape for part in parts} == {(rows, 4)}
    kept = np.concatenate([part.tokens[part.mask] for part in parts])
    assert kept.tolist() == whole.tokens[whole.mask].tolist()


def test_split_refuses_an_empty_batch():
    with pytest.raises(ValueError, match="batch is 0"):
        list(data.split(data.windows(np.arange(8), 4), 0))


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12))
def test_documents_fill_few_shapes_and_mask_padding(sizes):
    rows = [np.arange(1, size + 1) for size in sizes]
    batches = list(data.documents(rows, buckets=(32, 8)))
    assert {batch.tokens.shape[1] for batch in batches} <= {8, 32}
    scored = sum(int(batch.mask.sum()) for batch in batches)
    assert scored == sum(min(size, 32) - 1 for size in sizes)
    assert all((batch.tokens[batch.mask] > 0).all() for batch in batches)


def test_documents_need_a_bucket():
    with pytest.raises(ValueError, match="buckets are"):
        list(data.documents([[1, 2]], buckets=()))
