"""The training script's own mathematics, against optax and plain float32."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

sys.path.append(str(Path(__file__).parents[2] / "scripts"))
train_tiny = pytest.importorskip("train_tiny")
import train_tiny_data as data  # noqa: E402
import train_tiny_math as math  # noqa: E402

from qjax.models import layers  # noqa: E402


def draw(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(sum(shape)), shape).astype(jnp.bfloat16)


def relative(a: jax.Array, b: jax.Array) -> float:
    return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))


def test_cross_entropy_is_optaxs():
    hidden, table = draw(4, 8, 16).astype(jnp.float32), draw(32, 16).astype(jnp.float32)
    targets = jax.random.randint(jax.random.key(0), (4, 8), 0, 32)

    def plain(hidden, table):
        logits = hidden @ table.T
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return jnp.mean(losses)

    def fused(hidden, table):
        return math.cross_entropy(hidden, table, targets)

    (loss, grads), (expected, exact) = (
        jax.value_and_grad(f, argnums=(0, 1))(hidden, table) for f in (fused, plain)
    )
    assert abs(float(loss - expected)) < 1e-5
    for got, want in zip(grads, exact, strict=True):
        # The slope alone is rounded to bfloat16, 8 bits.
        assert relative(got, want) < 2.0**-8


def test_attention_is_the_models():
    q, k, v = (draw(2, 12, heads, 8).astype(jnp.float32) for heads in (4, 2, 2))
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((12, 12), bool)), (2, 12, 12))
    got = math.mixed_attention(q, k, v, mask, 0.3)
    want = layers.attention(q, k, v, mask, 0.3)
    assert relative(got, want) < 2.0**-7


def test_a_pass_sees_every_block_once():
    blocks = data.Blocks(np.arange(1000), length=10, batch_tokens=40, seed=0)
    steps = (1000 // 10 - 1) // 4
    seen = np.concatenate([blocks.batch(step).reshape(-1) for step in range(steps)])
    assert len(seen) == len(set(seen.tolist())) == steps * 40
    again = np.concatenate([blocks.batch(steps + s).reshape(-1) for s in range(steps)])
    assert (seen != again).any()


def test_the_rate_rises_and_falls_to_zero():
    config = train_tiny.Config(text=Path("unused"), max_steps=100, max_seconds=50.0)
    rates = [train_tiny.rate(config, x) for x in np.linspace(0, 1, 1001)]
    assert rates[0] == rates[-1] == 0.0
    assert max(rates) == pytest.approx(config.peak_rate)
    assert train_tiny.progress(config, 10, 25.0) == 0.5
    assert train_tiny.progress(config, 90, 25.0) == 0.9
