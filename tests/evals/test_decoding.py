"""Writing until it is enough: the tokens of the whole pass, in few programs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qjax.evals.decoding import continue_until
from qjax.models import Function, functional, llama, rope

LONGEST = 60
CONFIG = llama.Config(
    vocabulary=40,
    features=16,
    mlp_features=16,
    layers=1,
    heads=2,
    kv_heads=2,
    head_dim=8,
    context=LONGEST,
    epsilon=1e-5,
    rope=rope.plain(8, 10_000.0),
    tied=True,
    windows=(None,),
)


@pytest.fixture(scope="module")
def model():
    f, params = functional(llama.Llama(CONFIG, rngs=nnx.Rngs(0), scan_layers=True))

    def wide(leaf):
        return leaf + 0.3 * jax.random.normal(jax.random.key(leaf.size), leaf.shape)

    return f, jax.tree.map(wide, params)


@pytest.fixture(scope="module")
def prompts():
    draw = np.random.default_rng(0)
    return [draw.integers(0, 40, size).tolist() for size in (3, 50, 9, 1, 20)]


def never(row):
    return False


def test_each_prompt_is_continued_as_if_it_were_alone(model, prompts):
    f, params = model
    calls = []

    def counted(params, tokens, *rest, **named):
        calls.append(tokens.shape)
        return f(params, tokens, *rest, **named)

    watched = Function(counted, init_cache=f.init_cache)
    found = continue_until(
        watched, params, prompts, never, LONGEST, 10, batch=2, look=4, progress=False
    )
    whole = jax.jit(f)
    for prompt, new in zip(prompts, found, strict=True):
        kept = prompt[-(LONGEST - 10) :]
        row = jnp.array([kept + new + [0] * (LONGEST - len(kept) - len(new))])
        best = whole(params, row)[0].argmax(-1)
        start = len(kept) - 1
        assert new == best[start : start + 10].tolist()
    # For each of two lengths the dtype, the prompt and the step are traced once.
    prompts_traced = [shape for shape in calls if shape[1] > 1]
    assert len(calls) <= 2 * 3 and len(set(prompts_traced)) == 2


def test_it_stops_when_every_row_is_done(model, prompts):
    f, params = model
    looks = []

    def enough(row):
        looks.append(len(row))
        return len(row) >= 4

    options = {"batch": 2, "look": 4, "progress": False}
    found = continue_until(f, params, prompts[:2], enough, LONGEST, 8, **options)
    assert {len(row) for row in found} == {4}
    assert max(looks) == 4
    longer = continue_until(f, params, prompts[:2], never, LONGEST, 8, **options)
    assert [row[:4] for row in longer] == found


def test_sampling_follows_the_key(model, prompts):
    f, params = model

    def sample(seed, heat):
        return continue_until(
            f,
            params,
            prompts[:2],
            never,
            LONGEST,
            8,
            batch=2,
            temperature=heat,
            key=jax.random.key(seed),
            look=4,
            progress=False,
        )

    assert sample(0, 1.0) == sample(0, 1.0) != sample(1, 1.0)
    assert sample(0, 1e-4) == sample(0, 0.0)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"count": 60},
            ValueError,
            "60 tokens are to be added, but the",
        ),
        ({"prompts": [[]]}, ValueError, "a prompt has no tokens"),
        ({"batch": 0}, ValueError, "batch is 0"),
        ({"temperature": -1.0}, ValueError, "temperature is -1"),
        ({"temperature": 1.0}, ValueError, "key is None"),
        ({"f": Function(lambda p, t: t)}, TypeError, "decoding needs f.init_cache"),
    ],
)
def test_bad_arguments(model, changes, error, message):
    given = {
        "f": model[0],
        "params": model[1],
        "prompts": [[1]],
        "done": never,
        "longest": LONGEST,
        "count": 4,
    }
    with pytest.raises(error, match=message):
        continue_until(**(given | changes))
