"""LLM-QAT: torch's loss, and rows that the model would write."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.models import Function
from qjax.train import distillation_loss, generated_rows

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
V = 7
NEXT = jnp.asarray(np.random.default_rng(0).permutation(V))
FREE = jnp.asarray(np.random.default_rng(1).normal(size=V), jnp.float32)


def test_loss_and_gradient_are_those_of_torch():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    student, teacher = (rng.normal(size=(2, 5, V)).astype(np.float32) for _ in "st")
    own = torch.tensor(student, requires_grad=True)
    target = torch.softmax(torch.tensor(teacher), -1).reshape(-1, V)
    want = torch.nn.functional.cross_entropy(own.reshape(-1, V), target)
    want.backward()
    value, grads = jax.value_and_grad(distillation_loss, (0, 1))(student, teacher)
    np.testing.assert_allclose(value, want.detach().numpy(), rtol=1e-6)
    np.testing.assert_allclose(grads[0], own.grad.numpy(), atol=1e-7)
    assert not np.any(grads[1])


def written(params, tokens, cache=None, mask=None):
    """One likeliest successor for each token, and one distribution over the others."""
    logits = FREE + 20.0 * params * jax.nn.one_hot(NEXT[tokens], V)
    return logits if cache is None else (logits, cache)


F = Function(written, init_cache=lambda batch, length, dtype: jnp.zeros(()))


def test_a_few_likeliest_tokens_and_then_samples():
    key = jax.random.key(3)
    rows = generated_rows(F, jnp.float32(1), V, 5, 12, key, greedy=3, batch=2)
    assert rows.shape == (5, 12) and rows.dtype == np.int32
    np.testing.assert_array_equal(rows[:, 1:4], np.asarray(NEXT)[rows[:, :3]])
    again = generated_rows(F, jnp.float32(1), V, 5, 12, key, greedy=3, batch=2)
    np.testing.assert_array_equal(rows, again)


def test_samples_follow_the_models_distribution():
    rows = generated_rows(F, jnp.float32(0), V, 64, 64, jax.random.key(1), batch=64)
    assert (rows[:, 1:5] == int(jnp.argmax(FREE))).all()
    for drawn, wanted in ((rows[:, 5:], jax.nn.softmax(FREE)), (rows[:, :1], 1 / V)):
        shares = np.bincount(drawn.reshape(-1), minlength=V) / drawn.size
        spread = np.sqrt(np.asarray(wanted) * (1 - np.asarray(wanted)) / drawn.size)
        assert (np.abs(shares - wanted) < 4 * spread).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, "count is 0, expected at least 1"),
        ({"length": 5}, "length is 5, expected at least 6"),
        ({"greedy": -1}, "greedy is -1, expected at least 0"),
        ({"batch": 0}, "batch is 0, expected at least 1"),
    ],
)
def test_bad_arguments(options, message):
    given = {"vocabulary": V, "count": 2, "length": 12} | options
    with pytest.raises(ValueError, match=message):
        generated_rows(F, jnp.float32(1), key=jax.random.key(0), **given)
