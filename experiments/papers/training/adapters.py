"""Adapters on program text: how they start, how they are scaled, their magnitude.

Every setting is trained for 100 steps of 512 tokens at both `RATES` from two
seeds. A seed draws the batches, the same for every setting, and `A` where it starts at
random. Low-bit weights are decoded once, before the steps: the same numbers to their
rounding, in half the time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import NormalDist
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from language import BATCH, LENGTH, Found, Run, Texts, model, scorer, windows

import qjax
from qjax.core.formats import Codebook, Format
from qjax.core.qtensor import is_quantized
from qjax.trace.paths import flatten_with_paths
from qjax.train.step import next_token_loss

STEPS, SEEDS = 100, 2
RATES = (3e-3, 1e-2)
CALIBRATION = 256  # windows of the text that is trained on
EXAMPLE = (jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32),)


@dataclass(frozen=True)
class Setting:
    """What is trained beside what.

    Attributes:
      weights: the format of the frozen weights, for adapters that start at zero; None
        leaves them in float.
      start: splits weights into a frozen part and adapters; None starts at zero.
      rank, alpha, rslora, dora: as in `qjax.lora`.
    """

    weights: Format | None = None
    start: Any = None
    rank: int = 16
    alpha: int = 16
    rslora: bool = False
    dora: bool = False


def normal_float(bits: int) -> Format:
    """NF of 2 or 3 bits as in LoftQ's code: QLoRA's construction of NF4, shorter."""
    if bits == 4:
        return Codebook("nf4")
    half, last = 2 ** (bits - 1), 0.9677083
    above = np.linspace(last, 0.5, half + 1)[:-1]
    below = np.linspace(last, 0.5, half)[:-1]
    quantile = NormalDist().inv_cdf
    levels = [-quantile(p) for p in below] + [0.0] + [quantile(p) for p in above]
    return Codebook(tuple(sorted(x / quantile(last) for x in levels)))


def prepared(setting: Setting, path: Path, seed: int) -> tuple[Run, Any, Any]:
    """How it runs, the adapters and the frozen parameters."""
    f, params = model()
    if setting.weights is not None:
        recipe = qjax.RTN(weights=setting.weights)
        params = qjax.quantize(f, params, recipe, example=EXAMPLE, progress=False)
    f_lora, own = qjax.lora(
        f,
        params,
        setting.rank,
        setting.alpha,
        example=EXAMPLE,
        key=jax.random.key(seed),
        rslora=setting.rslora,
        dora=setting.dora,
    )
    if setting.start is None:
        return f_lora, own, params
    return f_lora, *started(setting, path)


@cache
def started(setting: Setting, path: Path) -> tuple[Any, Any]:
    """The adapters and the frozen parameters of a start, which no seed changes."""
    f, params = model()
    own = qjax.lora(
        f,
        params,
        setting.rank,
        setting.alpha,
        example=EXAMPLE,
        key=jax.random.key(0),
        rslora=setting.rslora,
    )[1]
    seen = np.split(windows(path)[0][:CALIBRATION], 4)
    calibration = [(jnp.asarray(rows),) for rows in seen]
    return qjax.initialise_lora(f, params, own, setting.start, calibration)


def descent(run: Run) -> Callable[..., tuple[Any, Any, Any]]:
    """`train(adapters, frozen, batches, rate) -> adapters, losses, gradient norms`.

    Adam, gradients clipped to a norm of 1 behind the norms that are returned, the
    schedule of the other papers.
    """
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1.0, STEPS // 10, STEPS)
    unit = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))

    @jax.jit
    def train(own: Any, frozen: Any, batches: Any, rate: Any) -> Any:
        def loss(own: Any, tokens: Any) -> Any:
            return next_token_loss(run(own, frozen, tokens), tokens)

        def step(carry: Any, tokens: Any) -> Any:
            own, state = carry
            value, gradient = jax.value_and_grad(loss)(own, tokens)
            moves, state = unit.update(gradient, state)
            moves = jax.tree.map(lambda x: rate * x, moves)
            norm = optax.global_norm(gradient)
            return (optax.apply_updates(own, moves), state), (value, norm)

        (own, _), seen = jax.lax.scan(step, (own, unit.init(own)), batches)
        return own, *seen

    return train


def batches(path: Path, seed: int) -> Any:
    """The windows of every step."""
    rows = windows(path)[0]
    chosen = np.random.default_rng(seed).integers(0, len(rows), (STEPS, BATCH))
    return jnp.asarray(rows[chosen])


def decoded(frozen: Any) -> Any:
    """Float arrays in place of codes."""
    one = lambda x: x.dequantize() if is_quantized(x) else x
    return jax.tree.map(one, frozen, is_leaf=is_quantized)


def before(setting: Setting, path: Path) -> dict[str, float]:
    """Held-out loss, and divergence from the float model, when nothing is trained."""
    run, own, frozen = prepared(setting, path, 0)
    found = scorer(run, path)(own, frozen)
    return {f"{name}_before": found[name] for name in ("loss", "kl")}


@cache
def measured(setting: Setting, path: Path) -> tuple[dict[str, Any], list[float]]:
    """The metrics, and the losses of every step, means over seeds.

    `loss` is the held-out loss at the better `rate`, `at_<rate>` that at each; `early`
    is the mean training loss of the first half of the steps at the better rate,
    `gradient` the mean norm of the adapters' gradient over the steps at the smaller.
    """
    run = prepared(setting, path, 0)[0]
    train, score = descent(run), scorer(run, path)

    def one(rate: float, seed: int) -> tuple[float, Any, Any]:
        _, own, frozen = prepared(setting, path, seed)
        frozen = decoded(frozen)
        own, *seen = train(own, frozen, batches(path, seed), jnp.float32(rate))
        return score(own, frozen)["loss"], *jax.device_get(seen)

    runs = {rate: [one(rate, seed) for seed in range(SEEDS)] for rate in RATES}
    held = {rate: [loss for loss, *_ in each] for rate, each in runs.items()}
    rate = min(held, key=lambda rate: np.nan_to_num(np.mean(held[rate]), nan=np.inf))
    curves = np.asarray([losses for _, losses, _ in runs[rate]])
    seeds = {f"at_{rate:g}": each for rate, each in held.items()}
    seeds["loss"] = held[rate]
    seeds["early"] = curves[:, : STEPS // 2].mean(1).tolist()
    seeds["gradient"] = [float(norms.mean()) for *_, norms in runs[RATES[0]]]
    metrics = {name: float(np.mean(each)) for name, each in seeds.items()}
    spread = float(np.std(seeds["loss"], ddof=1) / np.sqrt(SEEDS))
    own = {"standard_error": spread, "rate": rate, "seeds": seeds}
    found = metrics | own | before(setting, path)
    print(setting, found, flush=True)
    return found, curves.mean(0).tolist()


def rows(
    settings: dict[str, Setting],
    path: Path,
    untrained: dict[str, Setting] | None = None,
) -> Found:
    """Metrics and losses of every row; of some only what holds before training."""
    both = {label: measured(setting, path) for label, setting in settings.items()}
    found = {label: dict(metrics) for label, (metrics, _) in both.items()}
    found |= {label: before(each, path) for label, each in (untrained or {}).items()}
    return found, {label: curve for label, (_, curve) in both.items()}


def nuclear(setting: Setting, path: Path) -> np.ndarray:
    """The nuclear norm of what every layer's linears lose at the start."""
    _, own, frozen = prepared(setting, path, 0)
    exact = dict(flatten_with_paths(model()[1]))
    near = dict(flatten_with_paths(qjax.merge_lora(frozen, own)))
    lost = [np.asarray(exact[name] - near[name]) for name, _ in own.places]
    return np.concatenate([np.linalg.norm(x, "nuc", (-2, -1)) for x in lost])


def zero(bits: int) -> Setting:
    """QLoRA."""
    return Setting(weights=normal_float(bits))


def split(start: Any, bits: int, **options: Any) -> Setting:
    """A start on weights of so many bits."""
    return Setting(start=start(weights=normal_float(bits), **options))


def loftq(texts: Texts) -> Found:
    """LoftQ's start beside one at zero; at 4 and 3 bits before training alone."""
    low, untrained = (
        {
            **{f"QLoRA {bits} bits": zero(bits) for bits in some},
            **{f"LoftQ {bits} bits": split(qjax.LoftQ, bits) for bits in some},
        }
        for some in ((2,), (4, 3))
    )
    return rows({"LoRA on float": Setting(), **low}, texts.domain, untrained)


def qera(texts: Texts) -> Found:
    """Starts that weigh the error by activations beside LoftQ's; 3 bits untrained."""
    starts = {"LoftQ": qjax.LoftQ, "LQER": qjax.LQER, "QERA": qjax.QERA}
    low, untrained = (
        {f"{name} {bits} bits": split(start, bits) for name, start in starts.items()}
        for bits in (2, 3)
    )
    return rows(low, texts.domain, untrained)


def pissa(texts: Texts) -> Found:
    """The largest singular values in float."""
    settings = {"LoRA": Setting(), "PiSSA": Setting(start=qjax.PiSSA())}
    return rows(settings, texts.domain)


def qpissa(texts: Texts) -> Found:
    """The same with the rest in NF4: what is lost before training."""
    settings = {
        "QLoRA": zero(4),
        "LoftQ, one turn": split(qjax.LoftQ, 4, iters=1),
        "LoftQ, five turns": split(qjax.LoftQ, 4),
        "QPiSSA": split(qjax.PiSSA, 4),
    }
    found = rows({}, texts.domain, settings)[0]
    whole = nuclear(settings["QLoRA"], texts.domain)
    for label, setting in settings.items():
        error = float(np.mean(nuclear(setting, texts.domain) / whole))
        found[label] |= {"error": error, "reduction": 100 * (1 - error)}
    return found, {}


def rslora(texts: Texts) -> Found:
    """Both scales at low and high rank."""
    settings = {}
    for rank in (4, 64):
        settings[f"LoRA rank {rank}"] = Setting(rank=rank)
        settings[f"rsLoRA rank {rank}"] = Setting(rank=rank, rslora=True)
    return rows(settings, texts.domain)


def dora(texts: Texts) -> Found:
    """A magnitude or none, at the rank where the paper has the largest difference."""
    settings = {
        "LoRA rank 4": Setting(rank=4),
        "DoRA rank 4": Setting(rank=4, dora=True),
    }
    return rows(settings, texts.domain)


PAPERS = {
    "loftq": loftq,
    "qera": qera,
    "pissa": pissa,
    "qpissa": qpissa,
    "rslora": rslora,
    "dora": dora,
}
