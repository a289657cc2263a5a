"""Perplexity, KL and agreement against closed forms and scipy-free numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.data import windows
from qjax.evals.divergence import Yardstick, divergence, pair_sums, token_kl
from qjax.evals.perplexity import Protocol, next_token_sums, perplexity

VOCABULARY = 11


def bigram(table, tokens):
    """Logits that depend on the last token alone: contexts do not matter."""
    return table[tokens]


@pytest.fixture
def table():
    return 2 * jax.random.normal(jax.random.key(0), (VOCABULARY, VOCABULARY))


@pytest.fixture
def tokens():
    return np.random.default_rng(1).integers(0, VOCABULARY, 101)


def log_softmax64(x):
    x = np.asarray(x, np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def test_uniform_model_has_the_vocabulary_as_perplexity(tokens):
    flat = jnp.zeros((VOCABULARY, VOCABULARY))
    result = perplexity(bigram, flat, tokens, Protocol(window=10), progress=False)
    # The sums of a batch are float32.
    assert result.scores.perplexity == pytest.approx(VOCABULARY, rel=5e-6)


def test_certain_model_has_perplexity_one_and_accuracy_one():
    cycle = np.arange(60) % VOCABULARY
    table = 1e4 * jnp.roll(jnp.eye(VOCABULARY), 1, axis=1)
    result = perplexity(bigram, table, cycle, Protocol(window=12), progress=False)
    assert (result.scores.perplexity, result.scores.accuracy) == (1.0, 1.0)


@pytest.mark.parametrize("stride", [None, 3, 9])
@pytest.mark.parametrize("batch", [1, 4, 64])
def test_perplexity_equals_the_definition(table, tokens, stride, batch):
    protocol = Protocol(window=10, stride=stride, batch=batch)
    result = perplexity(bigram, table, tokens, protocol, progress=False)
    log_p = log_softmax64(table)
    # Non-overlapping windows leave out each window's first token.
    starts = [] if stride else range(0, tokens.size, 10)
    last = tokens.size if stride else 100
    scored = [t for t in range(1, last) if t not in starts]
    nll = -np.mean([log_p[tokens[t - 1], tokens[t]] for t in scored])
    assert result.tokens == len(scored)
    assert result.scores.nll == pytest.approx(nll, rel=1e-6)
    assert result.scores.perplexity == pytest.approx(np.exp(nll), rel=1e-6)
    hits = np.mean([log_p[tokens[t - 1]].argmax() == tokens[t] for t in scored])
    assert result.scores.accuracy == pytest.approx(hits)


def test_context_is_used_under_the_sliding_protocol(tokens):
    """A model that reads four tokens back scores better with overlap."""

    def recall(scale, tokens):
        seen = jax.nn.one_hot(jnp.roll(tokens, 4, axis=1), VOCABULARY)
        return scale * jnp.where(jnp.arange(tokens.shape[1])[:, None] >= 4, seen, 0.0)

    text = np.tile(tokens[:5], 30)
    scores = [
        perplexity(recall, jnp.float32(9), text, Protocol(8, s), progress=False).scores
        for s in (None, 2)
    ]
    assert scores[1].perplexity < scores[0].perplexity


def test_padding_never_enters_a_statistic(table, tokens):
    """Masked logits may be anything, NaN included."""
    cut = windows(tokens, 10, stride=7)
    rows, mask = jnp.asarray(cut.tokens), jnp.asarray(cut.mask)
    logits = jnp.where(jnp.roll(mask, -1, axis=1)[..., None], table[rows], jnp.nan)
    poisoned = next_token_sums(logits, rows, mask)
    clean = next_token_sums(table[rows], rows, mask)
    assert poisoned.nll == clean.nll
    pair = pair_sums(logits, logits, rows, mask)
    assert pair.kl == 0.0
    assert pair.agreements == tokens.size - 1


def test_statistics_of_bf16_logits_are_float32(table, tokens):
    cut = windows(tokens, 10)
    rows, mask = jnp.asarray(cut.tokens), jnp.asarray(cut.mask)
    logits = table.astype(jnp.bfloat16)[rows]
    with jax.numpy_dtype_promotion("strict"):
        sums = pair_sums(logits, logits + 1, rows, mask)
    assert sums.kl.dtype == sums.candidate.nll.dtype == jnp.float32


def test_kl_equals_the_definition(table):
    other = table + jax.random.normal(jax.random.key(1), table.shape)
    log_p, log_q = log_softmax64(table), log_softmax64(other)
    expected = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    np.testing.assert_allclose(token_kl(table, other), expected, rtol=2e-5)


def test_kl_with_tokens_ruled_out():
    p = jnp.array([0.0, 0.0, -jnp.inf])
    q = jnp.array([0.0, 0.0, 0.0])
    assert token_kl(p, q) == pytest.approx(np.log(1.5))
    assert token_kl(q, p) == np.inf


def test_divergence_of_a_model_from_itself_is_zero(table, tokens):
    model = (bigram, table)
    result = divergence(model, model, tokens, Protocol(window=10), progress=False)
    assert (result.kl, result.top1_agreement) == (0.0, 1.0)
    assert result.reference == result.candidate
    assert result.tokens == 90


def test_divergence_equals_the_definition(table, tokens):
    other = table + jax.random.normal(jax.random.key(2), table.shape)
    steps = []
    yardstick = Yardstick((bigram, table), tokens, Protocol(window=10, batch=3))
    result = yardstick.measure(
        (bigram, other), progress=False, advance=lambda: steps.append(1)
    )
    log_p, log_q = log_softmax64(table), log_softmax64(other)
    contexts = [tokens[t - 1] for t in range(100) if t % 10]
    kl = (np.exp(log_p) * (log_p - log_q)).sum(-1)[contexts].mean()
    same = (log_p.argmax(-1) == log_q.argmax(-1))[contexts].mean()
    assert result.kl == pytest.approx(kl, rel=1e-5)
    assert result.top1_agreement == pytest.approx(same)
    alone = perplexity(bigram, other, tokens, Protocol(window=10), progress=False)
    assert result.candidate.nll == pytest.approx(alone.scores.nll, rel=1e-6)
    assert len(steps) == 4
    assert result.run_bytes > table.nbytes
    assert result.tokens_per_second > 0


@pytest.mark.parametrize("keep_bytes", [0, 2**20])
def test_kept_logits_change_nothing(table, tokens, keep_bytes):
    protocol = Protocol(window=10, batch=3)
    others = [table + jax.random.normal(jax.random.key(i), table.shape) for i in (1, 2)]
    yardstick = Yardstick((bigram, table), tokens, protocol, keep_bytes)
    for other in (*others, *others):
        found = yardstick.measure((bigram, other), progress=False)
        alone = divergence((bigram, table), (bigram, other), tokens, protocol)
        assert found.kl == alone.kl
        assert found.candidate == alone.candidate


def test_different_vocabularies_are_refused(table, tokens):
    small = jnp.zeros((VOCABULARY, 5))
    with pytest.raises(ValueError, match="vocabularies differ: 11 and 5"):
        divergence((bigram, table), (bigram, small), tokens, Protocol(window=10))
