"""A killed job goes on as if nothing had happened; accumulation is one large batch."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import qjax
from qjax.plots import loss_plot
from qjax.train.loop import load_state, read_metrics, run_job, save_state
from qjax.train.step import begin, next_token_loss, training_step

K, N = 16, 8
PARAMS = {"w": jax.random.normal(jax.random.key(0), (K, N))}
DROPPED = qjax.QAT(
    qjax.StraightThrough(qjax.Int(3), rounding="stochastic"),
    qjax.Observed(qjax.Int(8, qjax.tensor())),
)


def f(p, x):
    return x @ p["w"]


@pytest.fixture(scope="module")
def job():
    """A stochastic job with observed ranges: everything that a state can hold."""
    f_qat, qstate = qjax.fake_quantize(f, PARAMS, DROPPED, example=(jnp.ones((2, K)),))
    optimiser = optax.adam(1e-2)

    def loss(trained, observed, x, key):
        own = qjax.train.QState(qstate.trained, observed, qstate.plans)
        y, after = f_qat(trained, own, x, key=key)
        return jnp.mean((y - 1) ** 2), after.observed

    step = jax.jit(training_step(loss, optimiser))
    state = begin(PARAMS, optimiser, qstate.observed)

    def once(state, number):
        x = np.random.default_rng(number).normal(size=(2, 4, K))
        return step(state, jnp.asarray(x, jnp.float32), jax.random.key(5))

    return once, state


def without_seconds(folder):
    return [
        {k: v for k, v in line.items() if k != "seconds"}
        for line in read_metrics(folder)
    ]


def test_killed_and_resumed_is_bit_identical(job, tmp_path):
    once, state = job
    options = {"steps": 7, "save_every": 2, "evaluate_every": 3}
    held_out = lambda state: float(jnp.sum(state.trained["w"]))
    whole = run_job(once, state, tmp_path / "a", evaluate=held_out, **options)

    def killed(state, number):
        if number == 5:
            raise KeyboardInterrupt
        return once(state, number)

    with pytest.raises(KeyboardInterrupt):
        run_job(killed, state, tmp_path / "b", evaluate=held_out, **options)
    metrics = tmp_path / "b" / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"step": 6, "lo')
    made = []

    def counted(state, number):
        made.append(number)
        return once(state, number)

    again = run_job(counted, state, tmp_path / "b", evaluate=held_out, **options)
    assert made == [4, 5, 6]
    chex.assert_trees_all_equal(again, whole)
    assert without_seconds(tmp_path / "a") == without_seconds(tmp_path / "b")
    steps = [line["step"] for line in read_metrics(tmp_path / "b") if "loss" in line]
    assert steps == list(range(1, 8))
    names = sorted(p.name for p in (tmp_path / "b").iterdir())
    assert names == ["metrics.jsonl", "step-00000006", "step-00000007"]
    done = run_job(counted, state, tmp_path / "b", **options)
    chex.assert_trees_all_equal(done, whole)
    assert len(made) == 3
    loss_plot(tmp_path / "loss.png", read_metrics(tmp_path / "b"), "a job")
    assert (tmp_path / "loss.png").stat().st_size > 10_000


def test_a_checkpoint_is_exact(job, tmp_path):
    once, state = job
    state, _ = once(state, 0)
    chex.assert_trees_all_equal(load_state(save_state(tmp_path, state), state), state)


def test_accumulated_batches_are_one_large_batch():
    optimiser = optax.sgd(0.1)

    def loss(trained, carried, x, key):
        return jnp.mean((x @ trained["w"] - 1) ** 2), carried

    step = jax.jit(training_step(loss, optimiser))
    x = jax.random.normal(jax.random.key(1), (4, 6, K))
    start, key = begin(PARAMS, optimiser), jax.random.key(0)
    apart, value = step(start, x, key)
    together, same = step(start, x.reshape(1, 24, K), key)
    chex.assert_trees_all_close(apart.trained, together.trained, rtol=1e-5)
    chex.assert_trees_all_close(value, same, rtol=1e-5)


def test_next_token_loss_is_torchs():
    import torch

    logits = np.random.default_rng(0).normal(size=(2, 5, 11)).astype(np.float32)
    tokens = np.arange(10).reshape(2, 5) % 11
    want = torch.nn.functional.cross_entropy(
        torch.tensor(logits[:, :-1].reshape(-1, 11)),
        torch.tensor(tokens[:, 1:].reshape(-1)),
    )
    got = next_token_loss(jnp.asarray(logits), jnp.asarray(tokens))
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_counts_are_checked(job, tmp_path):
    once, state = job
    with pytest.raises(ValueError, match="steps is 0: give 1 or more"):
        run_job(once, state, tmp_path, steps=0, save_every=1)
    with pytest.raises(ValueError, match="save_every is 0: give 1 or more"):
        run_job(once, state, tmp_path, steps=1, save_every=0)
