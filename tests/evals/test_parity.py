"""Perplexity, accuracy and KL against transformers and torch on a random Llama."""

import numpy as np
import pytest

from qjax.evals import Protocol, divergence, perplexity
from qjax.io.huggingface import load_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
VOCABULARY, WINDOW = 96, 24


def random_llama(seed):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.4,
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two torch models and the same two as `(f, params)`."""
    theirs, ours = [random_llama(0), random_llama(1)], []
    for number, model in enumerate(theirs):
        folder = tmp_path_factory.mktemp(f"llama{number}")
        model.save_pretrained(folder)
        ours.append(load_model(folder)[:2])
    return theirs, ours


@pytest.fixture
def tokens():
    return np.random.default_rng(0).integers(0, VOCABULARY, 150).astype(np.int32)


def test_nonoverlapping_perplexity_is_the_papers(pair, tokens):
    """The loop of the GPTQ code: the model's own loss, window by window."""
    count = tokens.size // WINDOW
    rows = torch.tensor(tokens[: count * WINDOW].reshape(count, WINDOW)).long()
    with torch.no_grad():
        losses = [pair[0][0](row[None], labels=row[None]).loss.item() for row in rows]
    found = perplexity(*pair[1][0], tokens, Protocol(WINDOW, batch=4), progress=False)
    assert found.scores.perplexity == pytest.approx(np.exp(np.mean(losses)), rel=1e-5)
    assert found.tokens == count * (WINDOW - 1)


def test_sliding_perplexity_is_transformers(pair, tokens):
    """The sliding loop of transformers' guide: labels -100 on what was scored."""
    stride, before, total, scored = 10, 0, 0.0, 0
    for start in range(0, tokens.size, stride):
        end = min(start + WINDOW, tokens.size)
        row = torch.tensor(tokens[start:end]).long()[None]
        labels = row.clone()
        labels[:, : -(end - before)] = -100
        fresh = int((labels[:, 1:] != -100).sum())
        with torch.no_grad():
            total += pair[0][0](row, labels=labels).loss.item() * fresh
        scored += fresh
        before = end
        if end == tokens.size:
            break
    protocol = Protocol(WINDOW, stride, batch=4)
    found = perplexity(*pair[1][0], tokens, protocol, progress=False)
    assert found.tokens == scored == tokens.size - 1
    assert found.scores.nll == pytest.approx(total / scored, rel=1e-5)


def test_kl_and_agreement_are_torchs(pair, tokens):
    count = tokens.size // WINDOW
    rows = torch.tensor(tokens[: count * WINDOW].reshape(count, WINDOW)).long()
    with torch.no_grad():
        p, q = (model(rows).logits[:, :-1].double() for model in pair[0])
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    kl = torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True)
    found = divergence(*pair[1], tokens, Protocol(WINDOW, batch=4), progress=False)
    assert found.kl == pytest.approx(kl.sum(-1).mean().item(), rel=1e-4)
    same = (p.argmax(-1) == q.argmax(-1)).double().mean().item()
    assert found.top1_agreement == pytest.approx(same)
    hits = (q.argmax(-1) == rows[:, 1:]).double().mean().item()
    assert found.candidate.accuracy == pytest.approx(hits)
