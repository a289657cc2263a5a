"""Rows are those that each paper's code cuts, restated here from its text."""

import random

import datasets
import numpy as np
import pytest

from qjax import cuts

WORDS = np.random.default_rng(0)
ROWS = [
    {"text": " " * (i % 3) + "".join(chr(97 + c) for c in WORDS.integers(0, 26, size))}
    for i, size in enumerate(WORDS.integers(0, 40, 60))
]


def encode(row):
    return [ord(c) for c in row["text"].strip()]


def test_random_windows_are_gptqs():
    tokens = np.arange(500)
    random.seed(7)
    expected = []
    for _ in range(12):
        i = random.randint(0, len(tokens) - 32 - 1)
        expected.append(tokens[i : i + 32])
    found = cuts.random_windows(tokens, samples=12, length=32, seed=7)
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == np.int32


def test_document_windows_are_gptqs():
    length, expected = 23, []
    assert not any(len(encode(row)) == length for row in ROWS)
    random.seed(3)
    for _ in range(15):
        while True:
            i = random.randint(0, len(ROWS) - 1)
            tokens = encode(ROWS[i])
            if len(tokens) >= length:
                break
        i = random.randint(0, len(tokens) - length - 1)
        expected.append(tokens[i : i + length])
    found = cuts.document_windows(ROWS, encode, samples=15, length=length, seed=3)
    assert found.tolist() == expected


def test_blocks_are_awqs():
    shuffle = datasets.Dataset.from_list(ROWS).shuffle(seed=42)
    kept, count = [], 0
    for row in shuffle:
        tokens = [ord(c) for c in row["text"].strip()]
        if len(tokens) > 30 or not tokens:
            continue
        kept += tokens
        count += 1
        if count == 25:
            break
    expected = [kept[i * 32 : (i + 1) * 32] for i in range(len(kept) // 32)]
    rows = cuts.shuffled(ROWS, 42)
    found = cuts.blocks(rows, encode, samples=25, length=32, longest=30)
    assert found.tolist() == expected
    assert len(found) > 5


def test_first_documents_are_smoothquants():
    shuffle = datasets.Dataset.from_list(ROWS).shuffle(seed=42)
    expected = [encode(shuffle[i])[:16] for i in range(20)]
    found = cuts.first_documents(cuts.shuffled(ROWS), encode, samples=20, length=16)
    assert [row.tolist() for row in found] == [row for row in expected if row]


def test_a_stream_is_read_no_further_than_needed():
    read = []

    def stream():
        for row in ROWS:
            read.append(row)
            yield row

    cuts.blocks(stream(), encode, samples=4, length=8)
    assert 4 <= len(read) < 10
    read.clear()
    cuts.first_documents(stream(), encode, samples=3)
    assert len(read) == 3


def test_padding_is_a_token_that_no_row_holds():
    rows = [np.array(encode(row), np.int32) for row in ROWS if encode(row)]
    batches, mask_fn = cuts.padded(rows, vocabulary=128, batch=4, buckets=(8, 40))
    assert {tokens.shape for (tokens,) in batches} == {(4, 8), (4, 40)}
    kept = [line[mask] for (t,) in batches for line, mask in zip(t, mask_fn(t))]
    assert sorted(x.tolist() for x in kept if x.size) == sorted(
        row.tolist() for row in rows
    )
    for (tokens,) in batches:
        assert tokens[~mask_fn(tokens)].max(initial=0) < 97


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: cuts.random_windows(np.arange(8), 1, 8), "has 8 tokens, which is not"),
        (lambda: cuts.random_windows(np.arange(8), 0, 4), "samples is 0"),
        (lambda: cuts.document_windows(ROWS, encode, 1, 64), "none of 60 documents"),
        (lambda: cuts.document_windows(ROWS, encode, 1, 0), "length is 0"),
        (lambda: cuts.blocks(ROWS, encode, 2, 512), "fills no block of 512"),
        (lambda: cuts.blocks(ROWS, encode, longest=0), "longest is 0"),
        (lambda: cuts.first_documents([{"text": ""}], encode), "no document"),
        (lambda: cuts.first_documents(ROWS, encode, -1), "samples is -1"),
        (lambda: cuts.padded([np.arange(4)], 4), "hold all 4 tokens"),
        (lambda: cuts.padded([np.arange(40)], 99, 1, (8,)), "a row has 40 tokens"),
    ],
)
def test_what_cannot_be_cut(make, message):
    with pytest.raises(ValueError, match=message):
        make()
