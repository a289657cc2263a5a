"""Continuations are scored as a plain float64 loop scores them, in few programs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.evals.scoring import (
    Continuation,
    lengths,
    log_likelihoods,
    padded_length,
)

VOCABULARY, LONGEST = 13, 70


def causal(table, tokens):
    """Logits that depend on every earlier token of the row."""
    rows = table[tokens]
    counts = jnp.arange(1, tokens.shape[1] + 1)[None, :, None]
    return jnp.cumsum(rows, axis=1) / jnp.sqrt(counts)


@pytest.fixture(scope="module")
def table():
    return 2 * jax.random.normal(jax.random.key(0), (VOCABULARY, VOCABULARY))


def by_hand(table, context, tokens):
    read = [*context, *tokens][-(LONGEST + 1) :][:-1]
    rows = np.cumsum(np.asarray(table, np.float64)[read], axis=0)
    rows /= np.sqrt(np.arange(1, len(read) + 1))[:, None]
    rows = rows[-len(tokens) :]
    logp = rows - np.log(np.exp(rows).sum(-1, keepdims=True))
    total = sum(logp[i, token] for i, token in enumerate(tokens))
    return total, bool((rows.argmax(-1) == tokens).all())


def drawn(count, seed=1):
    draw = np.random.default_rng(seed)

    def some(low, high):
        return tuple(map(int, draw.integers(0, VOCABULARY, draw.integers(low, high))))

    return [Continuation(some(1, 90), some(1, 6)) for _ in range(count)]


def test_scores_are_those_of_the_definition(table):
    wanted = drawn(40)
    # Letters of multiple choice share a row; the likeliest one is greedy.
    wanted += [Continuation((3, 4, 5), (1, last)) for last in range(VOCABULARY)]
    traced = []

    def counted(params, tokens):
        traced.append(tokens.shape)
        return causal(params, tokens)

    found = log_likelihoods(counted, table, wanted, LONGEST, batch=4, progress=False)
    for each, (total, greedy) in zip(wanted, found, strict=True):
        expected, best = by_hand(table, *each)
        assert total == pytest.approx(expected, rel=1e-5, abs=1e-5)
        assert greedy == best
    assert any(len(c.context) + len(c.tokens) > LONGEST + 1 for c in wanted)
    # One program a length, whatever the batch.
    assert len(traced) == len(set(traced)) <= len(lengths(LONGEST))
    assert {shape[0] for shape in traced} == {4}


def test_greedy_is_every_token(table):
    first = int(by_argmax(table, (2, 7)))
    second = int(by_argmax(table, (2, 7, first)))
    wanted = [
        Continuation((2, 7), (first, second)),
        Continuation((2, 7), ((first + 1) % VOCABULARY, second)),
        Continuation((2, 7), (first, (second + 1) % VOCABULARY)),
    ]
    found = log_likelihoods(causal, table, wanted, LONGEST, progress=False)
    assert [greedy for _, greedy in found] == [True, False, False]


def by_argmax(table, tokens):
    return causal(table, jnp.array([tokens]))[0, -1].argmax()


def test_rows_of_equal_input_are_read_once(table):
    rows = []

    def seen(tokens):
        rows.extend(map(tuple, np.asarray(tokens)))

    def watched(params, tokens):
        jax.debug.callback(seen, tokens)
        return causal(params, tokens)

    letters = [Continuation((1, 2), (letter,)) for letter in range(4)]
    log_likelihoods(watched, table, letters, LONGEST, batch=1, progress=False)
    jax.effects_barrier()
    assert len(rows) == 1


def test_lengths():
    assert lengths(512) == (32, 48, 64, 96, 128, 192, 256, 384, 512)
    assert lengths(20) == (20,)
    assert [padded_length(n, 512) for n in (1, 32, 33, 512)] == [32, 32, 48, 512]
    for count in range(33, 513):
        assert padded_length(count, 512) - count <= padded_length(count, 512) / 3


def test_nothing_to_score(table):
    assert log_likelihoods(causal, table, [], LONGEST) == []


@pytest.mark.parametrize(
    ("each", "options", "message"),
    [
        (Continuation((), (1,)), {}, "has no tokens"),
        (Continuation((1,), ()), {}, "has no tokens"),
        (Continuation((1,), (1,) * 71), {}, "has 71 tokens, but the model reads 70"),
        (Continuation((1,), (1,)), {"batch": 0}, "batch is 0"),
    ],
)
def test_what_cannot_be_scored(table, each, options, message):
    with pytest.raises(ValueError, match=message):
        log_likelihoods(causal, table, [each], LONGEST, **options)
