"""A small net of images, trained quantized: what papers before language models train.

Four linears on scikit-learn's 1797 digits of 8 x 8 pixels, each but the last behind a
normalisation over the batch; the first and the last stay in float, as in the papers.
Every setting is trained from several starts at once (`jax.vmap`), one program for all
steps; `loss` is the cross-entropy of digits that were not trained on, in nats, and
`top1` how many are right, both means over starts.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import qjax

SEEDS, STEPS, BATCH, TRAINED, RATE = 6, 400, 64, 1200, 3e-3
SIZES = {"a": (64, 128), "b": (128, 128), "c": (128, 128), "d": (128, 10)}
QUANTIZED = ("b", "c")


@dataclass(frozen=True)
class Setting:
    """What is trained: None for float.

    Attributes:
      step: how weights and activations are quantized.
      activation: of the net, "relu" or "swish".
      normalised: whether values are normalised.
      decay: of what methods learn, as the sum of squares in the loss.
      faster: the learning rate of what methods learn, over that of the parameters.
      box: parameters are kept within +- this.
    """

    step: qjax.QAT | None
    activation: str = "relu"
    normalised: bool = True
    decay: float = 0.0
    faster: float = 1.0
    box: float | None = None


def digits() -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """Images and labels to train on, and held-out ones."""
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    x, y = (x[order] / 16).astype(np.float32), y[order]
    return (x[:TRAINED], y[:TRAINED]), (x[TRAINED:], y[TRAINED:])


def net(setting: Setting) -> Callable[..., Any]:
    """`f(params, images) -> logits`."""
    act = {"relu": jax.nn.relu, "swish": jax.nn.swish}[setting.activation]

    def settled(h: Any) -> Any:
        if not setting.normalised:
            return h
        return (h - h.mean(0)) / jnp.sqrt(h.var(0) + 1e-5)

    def f(params: Any, x: Any) -> Any:
        for name in ("a", "b", "c"):
            x = act(settled(x @ params[name]) + params[f"{name} bias"])
        return x @ params["d"]

    return f


def start(seed: Any) -> dict[str, Any]:
    """He's normal start."""
    keys = jax.random.split(jax.random.key(seed), len(SIZES))
    params = {
        name: jax.random.normal(key, size) * np.sqrt(2 / size[0])
        for (name, size), key in zip(SIZES.items(), keys)
    }
    return params | {f"{n} bias": jnp.zeros(SIZES[n][-1]) for n in ("a", "b", "c")}


def prepared(setting: Setting, params: Any, x: Any) -> tuple[Any, Any]:
    """`f(params, trained, x, key)`, and what is learned beside the parameters."""
    f = net(setting)
    if setting.step is None:
        return lambda p, trained, x, key: f(p, x), {}
    f_qat, state = qjax.fake_quantize(f, params, setting.step, [(x,)])

    def run(p: Any, trained: Any, x: Any, key: Any) -> Any:
        return f_qat(p, replace(state, trained=trained), x, key=key)[0]

    return run, state.trained


def score(logits: Any, labels: Any) -> Any:
    """Mean cross-entropy."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean()


def trained(setting: Setting, floats: Any | None = None) -> tuple[Any, dict[str, Any]]:
    """The parameters of every start, and the metrics.

    Args:
      setting: what to train.
      floats: parameters to start from; None starts afresh.
    """
    train, held = (tuple(map(jnp.asarray, each)) for each in digits())
    if floats is None:
        floats = jax.vmap(start)(jnp.arange(SEEDS))
    each = [jax.tree.map(lambda x, i=i: x[i], floats) for i in range(SEEDS)]
    made = [prepared(setting, params, train[0][:256]) for params in each]
    run, learned = (
        made[0][0],
        jax.tree.map(lambda *x: jnp.stack(x), *[m[1] for m in made]),
    )
    optimiser = optax.adam(optax.cosine_decay_schedule(RATE, STEPS))

    def loss(both: Any, chosen: Any, key: Any) -> Any:
        logits = run(*both, train[0][chosen], key)
        squares = sum(jnp.sum(x**2) for x in jax.tree.leaves(both[1]))
        return score(logits, train[1][chosen]) + setting.decay * squares

    def boxed(both: Any) -> Any:
        if setting.box is None:
            return both
        kept = lambda w: jnp.clip(w, -setting.box, setting.box)
        return jax.tree.map(kept, both[0]), both[1]

    def step(carry: Any, key: Any) -> Any:
        both, state = carry
        pick, noise = jax.random.split(key)
        chosen = jax.random.randint(pick, (BATCH,), 0, TRAINED)
        grads = jax.grad(loss)(both, chosen, noise)
        (moves, own), state = optimiser.update(grads, state)
        own = jax.tree.map(lambda x: setting.faster * x, own)
        return (boxed(optax.apply_updates(both, (moves, own))), state), None

    @jax.jit
    @jax.vmap
    def job(both: Any, key: Any) -> Any:
        keys = jax.random.split(key, STEPS)
        (both, _), _ = jax.lax.scan(step, (both, optimiser.init(both)), keys)
        logits = run(*both, held[0], None)
        right = jnp.mean(jnp.argmax(logits, -1) == held[1])
        return both[0], score(logits, held[1]), right

    keys = jax.random.split(jax.random.key(1), SEEDS)
    params, losses, right = job((floats, learned), keys)
    spread = float(np.std(losses) / np.sqrt(SEEDS))
    metrics = {"loss": float(losses.mean()), "standard_error": spread}
    return params, metrics | {"top1": 100 * float(right.mean())}


def step_of(weights: Any, activations: Any = None, gradients: Any = None) -> qjax.QAT:
    """Of the linears between the first and the last."""
    return qjax.QAT(weights, activations, targets=QUANTIZED, gradients=gradients)


def fixed(bits: int) -> qjax.QAT:
    """Straight-through, on ranges that are those of the largest values."""
    return step_of(qjax.StraightThrough(qjax.Int(bits, qjax.tensor())), unclipped(bits))


def lsq(bits: int, unsigned: bool = True) -> qjax.QAT:
    """Both with learned steps."""
    return step_of(qjax.LSQ(bits), qjax.LSQ(bits, unsigned=unsigned))


def pact(bits: int) -> Setting:
    """The paper's pair: DoReFa's weights, learned clipping of activations.

    Adam's steps are as small as those of the weights, but a level is 20 times as large.
    """
    step = step_of(qjax.DoReFa(bits), qjax.PACT(bits, alpha=6.0))
    return Setting(step, decay=1e-4, faster=10.0)


def dorefa(weights: int, activations: int, gradients: int | None) -> Setting:
    """DoReFa, with gradients of so many bits."""
    rounded = None if gradients is None else qjax.DoReFaGradients(gradients)
    pair = qjax.DoReFa(weights), qjax.DoReFa(activations)
    return Setting(step_of(*pair, rounded))


def of_weights(bits: int, inputs: Any) -> Setting:
    """DoReFa's weights with other activations."""
    return Setting(step_of(qjax.DoReFa(bits), inputs))


def unclipped(bits: int) -> Any:
    """Activations on the range of their largest."""
    return qjax.StraightThrough(
        qjax.Int(bits, qjax.tensor(), symmetric=False, zero="int")
    )


def settings(paper: str) -> dict[str, Setting]:
    """The rows of a paper; those that start from float parameters are `TUNED`."""
    if paper == "lsq":
        rows = {f"fixed ranges W{b}A{b}": Setting(fixed(b)) for b in (2, 3)}
        return rows | {f"LSQ W{b}A{b}": Setting(lsq(b)) for b in (2, 3)}
    if paper == "lsq_plus":
        plus = step_of(qjax.LSQPlus(2), qjax.LSQPlus(2))
        return {
            "LSQ W2A2, swish": Setting(lsq(2, False), "swish"),
            "LSQ+ W2A2, swish": Setting(plus, "swish"),
        }
    if paper == "pact":
        rows = {}
        for b in (4, 2):
            rows[f"PACT W{b}A{b}"] = pact(b)
            rows[f"clipped at 1 W{b}A{b}"] = dorefa(b, b, None)
            rows[f"unclipped W{b}A{b}"] = of_weights(b, unclipped(b))
        return rows
    if paper == "dorefa":
        return {
            "DoReFa W1A2G32": dorefa(1, 2, None),
            "DoReFa W1A2G6": dorefa(1, 2, 6),
            "DoReFa W1A2G2": dorefa(1, 2, 2),
            "DoReFa W1A1G32": dorefa(1, 1, None),
            "DoReFa W1A1G6": dorefa(1, 1, 6),
        }
    binary = {"XNOR's weights": qjax.XNOR(), "BinaryConnect": qjax.BinaryConnect()}
    return {
        label: Setting(step_of(method), normalised=False, box=1.0)
        for label, method in binary.items()
    }


TUNED = ("lsq", "lsq_plus")
PAPERS = ("lsq", "lsq_plus", "pact", "dorefa", "binary")


def rows(paper: str) -> dict[str, dict[str, Any]]:
    """The metrics of every row of a paper, the float net's first."""
    chosen = settings(paper)
    first = next(iter(chosen.values()))
    floats, metrics = trained(replace(first, step=None, decay=0.0))
    found = {"float": metrics}
    for label, setting in chosen.items():
        start_from = floats if paper in TUNED else None
        found[label] = trained(setting, start_from)[1]
        print(paper, label, found[label], flush=True)
    return found
