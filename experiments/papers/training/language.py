"""The bundled Llama, trained quantized for a short time: what later papers train.

Windows of 64 tokens, 8 of them a step, all steps in one program (`lax.scan`). `loss`
is the negative log-likelihood of held-out windows in nats for each token, `kl` the
divergence from the float model there.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import qjax
from qjax.commands.compare import quantized_bits
from qjax.commands.inputs import BUNDLED
from qjax.core.formats import Codebook
from qjax.data import encode_text, file_text, load_text
from qjax.evals import Protocol, Yardstick
from qjax.io.huggingface import load_weights, read_tokenizer
from qjax.train.step import TrainState, begin, next_token_loss, training_step

G64 = qjax.group(64)
CHANNEL = qjax.channel()
TOKENS8 = qjax.StraightThrough(qjax.Int(8, qjax.token(), scale_rule="narrow"))
LENGTH, BATCH, HELD, CHARACTERS = 64, 8, 64, 600_000


@dataclass(frozen=True)
class Texts:
    """What is trained and scored on: general text, and a new domain."""

    general: Path
    domain: Path


@cache
def model() -> tuple[Any, Any]:
    """`(f, params)` in float32."""
    return load_weights(BUNDLED, dtype=jnp.float32, scan_layers=True)[:2]


@cache
def windows(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Windows to train on, and those at the end, which are held out."""
    text = file_text(path)
    text = replace(text, text=text.text[:CHARACTERS])
    tokens = encode_text(read_tokenizer(BUNDLED), text)
    cut = tokens[: len(tokens) // LENGTH * LENGTH].reshape(-1, LENGTH)
    return cut[:-HELD], cut[-HELD:]


Run = Callable[[Any, Any, Any], Any]
"""`run(trained, frozen, tokens) -> logits`, `trained` as the job has it."""


@cache
def reference(path: Path) -> list[tuple[Any, Any]]:
    """Held-out windows, and the float model's logarithms of probabilities there."""
    f, params = model()
    exact = jax.jit(lambda p, tokens: jax.nn.log_softmax(f(p, tokens)))
    parts = [jnp.asarray(rows) for rows in np.split(windows(path)[1], 4)]
    return [(rows, exact(params, rows)) for rows in parts]


def scorer(run: Run, path: Path) -> Callable[[Any, Any], dict[str, float]]:
    """`score(trained, frozen)`: loss and divergence on held-out windows."""

    @jax.jit
    def one(trained: Any, frozen: Any, tokens: Any, exact: Any) -> Any:
        logits = run(trained, frozen, tokens)
        mine = jax.nn.log_softmax(logits)
        kl = jnp.sum(jnp.exp(exact) * (exact - mine), -1).mean()
        return next_token_loss(logits, tokens), kl

    def score(trained: Any, frozen: Any) -> dict[str, float]:
        parts = [one(trained, frozen, *each) for each in reference(path)]
        loss, kl = np.mean(jax.device_get(parts), 0)
        return {"loss": float(loss), "perplexity": float(np.exp(loss)), "kl": float(kl)}

    return score


def scored(run: Run, trained: Any, frozen: Any, path: Path) -> dict[str, float]:
    """Loss and divergence on held-out windows."""
    return scorer(run, path)(trained, frozen)


def job(
    run: Run,
    trained: Any,
    rows: np.ndarray,
    steps: int,
    rate: float,
    frozen: Any = None,
    teacher: Any = None,
) -> tuple[Any, list[float]]:
    """What was trained, and the loss of every step.

    With a teacher's parameters its logits are learned, else the text.
    """
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, steps // 10, steps)
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))

    def loss(own: Any, _: Any, tokens: Any, key: Any, frozen: Any, known: Any) -> Any:
        logits = run(own, frozen, tokens)
        if known is None:
            return next_token_loss(logits, tokens), None
        return qjax.distillation_loss(logits, model()[0](known, tokens)), None

    step = training_step(loss, optimiser)

    @jax.jit
    def all_steps(state: TrainState, batches: Any, *rest: Any) -> Any:
        key = jax.random.key(0)
        return jax.lax.scan(lambda s, b: step(s, b, key, *rest), state, batches)

    chosen = np.random.default_rng(0).integers(0, len(rows), (steps, 1, BATCH))
    batches, start = jnp.asarray(rows[chosen]), begin(trained, optimiser)
    state, losses = all_steps(start, batches, frozen, teacher)
    return state.trained, np.asarray(losses).tolist()


def quantizing(
    step: qjax.QAT, f: Any = None, params: Any = None, rows: Any = None
) -> tuple[Any, Any]:
    """The bundled model quantized in training: how it runs, and what is trained.

    `rows` are seen by methods whose ranges start from activations.
    """
    own, start = model()
    f, start = own if f is None else f, start if params is None else params
    rows = np.zeros((BATCH, LENGTH), np.int32) if rows is None else rows
    f_qat, state = qjax.fake_quantize(f, start, step, [(jnp.asarray(rows),)])
    return partial(quantized, f_qat, state=state), (start, state.trained)


def quantized(f_qat: Any, trained: Any, _: Any, tokens: Any, state: Any) -> Any:
    """The logits in training."""
    return f_qat(trained[0], replace(state, trained=trained[1]), tokens)[0]


Found = tuple[dict[str, dict[str, float]], dict[str, list[float]]]
"""Metrics and losses of every row, by label."""


def floating(params: Any, _: Any, tokens: Any) -> Any:
    """The logits in float."""
    return model()[0](params, tokens)


def paretoq(texts: Texts) -> Found:
    """Two bits for every output feature."""
    path, found, curves = texts.general, {}, {}
    rows = windows(path)[0]
    found["float"] = scored(floating, model()[1], None, path)
    methods = {
        "fixed ranges 2 bits": qjax.StraightThrough(qjax.Int(2, qjax.channel())),
        "LSQ 2 bits": qjax.LSQ(2, qjax.channel()),
        "ParetoQ 2 bits": qjax.ParetoQ(2),
    }
    for label, method in methods.items():
        run, start = quantizing(qjax.QAT(method))
        if "RTN 2 bits" not in found:
            found["RTN 2 bits"] = scored(run, start, None, path)
        done, curves[label] = job(run, start, rows, 150, 1e-3)
        found[label] = scored(run, done, None, path)
    return found, curves


def bitnet(texts: Texts) -> Found:
    """From scratch: float, and ternary weights with 8-bit tokens."""
    path, found, curves = texts.general, {}, {}
    rows, fresh = windows(path)[0], started(model()[1])
    label = "float, from scratch"
    floats, curves[label] = job(floating, fresh, rows, 200, 3e-3)
    found[label] = scored(floating, floats, None, path)
    run, start = quantizing(qjax.QAT(qjax.BitNet(), TOKENS8), params=fresh)
    rounded = (floats, start[1])
    found["float, ternary when trained"] = scored(run, rounded, None, path)
    label = "BitNet b1.58, from scratch"
    done, curves[label] = job(run, start, rows, 200, 3e-3)
    found[label] = scored(run, done, None, path)
    return found, curves


def started(params: Any) -> Any:
    """A fresh start: normal weights of 0.02, norms of 1."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    keys = jax.random.split(jax.random.key(3), len(leaves))

    def one(path: Any, leaf: Any, key: Any) -> Any:
        if "norm" in jax.tree_util.keystr(path):
            return jnp.ones_like(leaf)
        return 0.02 * jax.random.normal(key, leaf.shape, leaf.dtype)

    new = [one(path, leaf, key) for (path, leaf), key in zip(leaves, keys)]
    return jax.tree.unflatten(structure, new)


def llm_qat(texts: Texts) -> Found:
    """W4A8KV4 without data: windows that the float model writes, and its logits."""
    path, found, curves = texts.general, {}, {}
    f, params = model()
    written = qjax.generated_rows(
        f, params, 4096, 512, LENGTH, jax.random.key(5), batch=128
    )
    weights = qjax.StraightThrough(qjax.Int(4, qjax.channel()))
    step, both = qjax.QAT(weights, TOKENS8), qjax.quantize_kv(f, 4)
    found["float"] = scored(floating, params, None, path)
    run, start = quantizing(step, both)
    found["RTN W4A8KV4"] = scored(run, start, None, path)
    label = "LLM-QAT W4A8KV4"
    # At 4 bits the start is near: with steps ten times as long it ends farther away.
    done, curves[label] = job(run, start, written, 100, 3e-5, teacher=params)
    found[label] = scored(run, done, None, path)
    return found, curves


def qlora(texts: Texts) -> Found:
    """Formats before training, and adapters beside float and beside codes."""
    path, found, curves = texts.domain, {}, {}
    f, params = model()
    example = (jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32),)
    found["float"] = scored(floating, params, None, path)
    formats = {
        "Int4": qjax.Int(4, G64),
        "FP4": Codebook("fp4"),
        "NF4": Codebook("nf4"),
        "NF4 and double": Codebook("nf4", double_quant=256),
    }
    sides = {"float": params}
    for label, format in formats.items():
        recipe = qjax.RTN(weights=format)
        q = qjax.quantize(f, params, recipe, example=example, progress=False)
        run = lambda q, _, tokens: qjax.apply(f)(q, tokens)
        found[label], sides[label] = scored(run, q, None, path), q
    for label in ("float", "NF4 and double"):
        base = sides[label]
        f_lora, own = qjax.lora(f, base, example=example, key=jax.random.key(0))
        name = f"{'LoRA' if label == 'float' else 'QLoRA'} on {label}"
        done, curves[name] = job(f_lora, own, windows(path)[0], 100, 3e-3, base)
        found[name] = scored(f_lora, done, base, path)
    return found, curves


def trained_methods(texts: Texts) -> Found:
    """Every method on the bundled model, as it is served: rows of the README's table.

    200 steps to the float model's logits; scored on the text of `qjax compare`.
    """
    rows, found, curves = windows(texts.general)[0], {}, {}
    f, params = model()
    tokens = encode_text(read_tokenizer(BUNDLED), load_text("pydoc"))[: 2**14]
    yardstick = Yardstick((f, params), tokens, Protocol())
    for label, (rate, *quantizers) in METHODS.items():
        began = time.perf_counter()
        run, start = quantizing(qjax.QAT(*quantizers), rows=rows[:BATCH])
        done, curves[label] = job(run, start, rows, 200, rate, teacher=params)
        served = qjax.finalize(done[0], replace(run.keywords["state"], trained=done[1]))
        seconds = time.perf_counter() - began
        measured = yardstick.measure((qjax.apply(f), served), progress=False)
        found[label] = {
            "bits_per_weight": quantized_bits(served),
            "perplexity": measured.candidate.perplexity,
            "kl": measured.kl,
            "top1_agreement": measured.top1_agreement,
            "quantize_seconds": seconds,
        }
    return found, curves


# The rate that each is trained with: fewer bits start further from the float model.
METHODS = {
    "straight-through int4 g64": (1e-4, qjax.StraightThrough(qjax.Int(4, G64))),
    "LSQ int4 g64": (1e-4, qjax.LSQ(4, G64)),
    "LSQ int3 g64": (2e-4, qjax.LSQ(3, G64)),
    "LSQ int2 g64": (5e-4, qjax.LSQ(2, G64)),
    "LSQ+ int4, inputs int8": (1e-4, qjax.LSQPlus(4, CHANNEL), qjax.LSQPlus(8)),
    "LSQ int4, inputs PACT": (1e-4, qjax.LSQ(4, CHANNEL), qjax.PACT(8, signed=True)),
    "ParetoQ int3": (2e-4, qjax.ParetoQ(3)),
    "ParetoQ int2": (5e-4, qjax.ParetoQ(2)),
    "ParetoQ ternary": (1e-3, qjax.ParetoQ(1.58)),
    "ParetoQ binary": (1e-3, qjax.ParetoQ(1)),
    "BitNet ternary": (1e-3, qjax.BitNet()),
    "XNOR binary": (1e-3, qjax.XNOR()),
    "DoReFa int4": (1e-3, qjax.DoReFa(4)),
    "BinaryConnect": (1e-3, qjax.BinaryConnect()),
}

PAPERS = {
    "paretoq": paretoq,
    "bitnet": bitnet,
    "llm_qat": llm_qat,
    "qlora": qlora,
    "methods": trained_methods,
}
