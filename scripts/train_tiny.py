"""Train the bundled tiny Llama and export it as a Hugging Face folder.

    python scripts/train_tiny.py --text books.txt.gz --max-seconds 7200

Muon on the hidden matrices, AdamW on the rest; linear decay to zero by steps or by
the wall clock, whichever is nearer its end, so that a run on a shared machine is
annealed when its time is up. Contractions take bfloat16 and accumulate in float32.
"""

import dataclasses
import functools
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import tyro
from flax import nnx
from rich.progress import Progress
from safetensors.flax import load_file
from train_tiny_data import Blocks, load_tokenizer, tokenise
from train_tiny_export import describe, draw, export
from train_tiny_math import cross_entropy, mixed_attention, mixed_linear

from qjax.models import llama, rope
from qjax.models.functional import functional

SEPARATOR = "<|endoftext|>"


@dataclasses.dataclass(frozen=True)
class Config:
    """What to train on, for how long, and how."""

    text: Path
    """Text, plain or gzipped; documents end at lines of `<|endoftext|>`."""
    out: Path = Path("runs/tiny")
    """Folder of checkpoints, losses, the picture and the exported model."""
    tokenizer: Path | None = None
    """Folder of a tokenizer to reuse; without it a byte-level BPE is trained."""
    init: Path | None = None
    """Hugging Face folder of a model of this shape to start from."""
    init_tokens: float = 0
    """Millions of tokens that model was trained on, for the card."""
    resume: bool = False
    """Go on from the newest checkpoint in `out`."""
    evaluate: tuple[Path, ...] = ()
    """Text files whose perplexities the card states, beside CPython's topics."""
    max_steps: int = 20_000
    """Optimiser steps."""
    max_seconds: float = float("inf")
    """Seconds of training, those before a resume included."""
    batch_tokens: int = 4096
    """Tokens per step."""
    context: int = 512
    """Tokens per sequence."""
    short_context: int = 128
    """Tokens per sequence in the first part of the run."""
    short_fraction: float = 0.5
    """How much of the run uses the short context."""
    peak_rate: float = 2e-3
    """Learning rate after warm-up (Muon scaled to AdamW's update size)."""
    warmup: float = 0.03
    """Fraction of the run in which the rate rises."""
    weight_decay: float = 0.1
    """Decay of the hidden matrices, times the rate."""
    validation: float = 0.01
    """Fraction of the documents, the last ones, kept for validation."""
    validation_tokens: int = 32_768
    """Tokens of these that are evaluated."""
    checkpoint_seconds: float = 300
    """Seconds between checkpoints."""
    seed: int = 0
    """Seed of the initialisation and of the order of the text."""


TINY = llama.Config(
    vocabulary=4096,
    features=256,
    mlp_features=768,
    layers=8,
    heads=8,
    kv_heads=4,
    head_dim=32,
    context=512,
    epsilon=1e-5,
    rope=rope.plain(32, 10_000.0),
    tied=True,
    windows=(None,) * 8,
)


def build(seed: int) -> tuple[Any, dict[str, Any]]:
    """The model's hidden states as a function, with mixed-precision contractions."""
    model = llama.Llama(TINY, rngs=nnx.Rngs(seed))
    for _, module in nnx.iter_modules(model):
        if isinstance(module, nnx.Linear):
            module.dot_general = mixed_linear
        if isinstance(module, llama.Attention):
            module.attention = mixed_attention
    return functional(model, method="hidden")


def read_folder(folder: Path, params: dict[str, Any]) -> dict[str, Any]:
    """Parameters of the same shapes from a Hugging Face folder, in float32."""
    tensors = load_file(folder / "model.safetensors")
    params = jax.tree.map(lambda leaf: leaf, params)
    for name in llama.names(TINY):
        for layer in range(TINY.layers):
            value = tensors[name.hf.format(layer=layer)].astype(jnp.float32)
            *parents, last = name.path.format(layer=layer).split("/")
            node = params
            for part in parents:
                node = node[part]
            node[last] = value.T if name.transpose else value
    return params


def optimiser(weight_decay: float) -> optax.GradientTransformation:
    """Muon on matrices but the embedding, AdamW elsewhere; unit learning rate."""

    def dimensions(params):
        def is_hidden(path, leaf):
            return leaf.ndim == 2 and "embed" not in str(path[0])

        axes = optax.contrib.MuonDimensionNumbers()

        def pick(path, leaf):
            return axes if is_hidden(path, leaf) else None

        return jax.tree_util.tree_map_with_path(pick, params)

    muon = optax.contrib.muon(
        1.0,
        weight_decay=weight_decay,
        muon_weight_dimension_numbers=dimensions,
        consistent_rms=0.2,
        adam_b2=0.95,
    )
    return optax.chain(optax.clip_by_global_norm(1.0), muon)


def rate(config: Config, progress: float) -> float:
    """Learning rate when this fraction of the run is over."""
    rising = progress / config.warmup
    falling = (1.0 - progress) / (1.0 - config.warmup)
    return config.peak_rate * max(0.0, min(rising, falling))


def make_step(f: Any, tx: optax.GradientTransformation) -> Any:
    """The jitted training step and validation loss."""

    def loss(params, tokens):
        hidden, _ = f(params, tokens)
        return cross_entropy(
            hidden[:, :-1], params["embed"]["embedding"], tokens[:, 1:]
        )

    def step(params, state, tokens, scale):
        value, gradient = jax.value_and_grad(loss)(params, tokens)
        updates, state = tx.update(gradient, state, params)
        updates = jax.tree.map(lambda update: scale * update, updates)
        return optax.apply_updates(params, updates), state, value

    return jax.jit(step, donate_argnums=(0, 1)), jax.jit(loss)


def train(config: Config) -> None:
    """Run to the end of the budget, then export."""
    out = config.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(
        json.dumps(dataclasses.asdict(config), default=lambda path: path.name)
    )
    tokenizer = load_tokenizer(config.tokenizer, config.text, out, SEPARATOR)
    train_ids, valid_ids = tokenise(
        tokenizer, config.text, out, SEPARATOR, config.validation
    )
    blocks = Blocks(train_ids, config.context, config.batch_tokens, config.seed)
    count = config.validation_tokens // config.context
    valid = valid_ids[: count * config.context].reshape(-1, config.context)

    f, params = build(config.seed)
    if config.init is not None:
        params = read_folder(config.init, params)
    tx = optimiser(config.weight_decay)
    state = {"params": params, "optimiser": tx.init(params)}
    clock = {"step": 0, "seconds": 0.0}
    options = ocp.CheckpointManagerOptions(max_to_keep=2)
    with ocp.CheckpointManager(out / "checkpoints", options=options) as manager:
        if config.resume:
            state, clock = restore(manager, state)
        log = Log(out / "loss.jsonl", clock["step"])
        params = run(
            config, make_step(f, tx), state, clock, blocks, valid, manager, log
        )
    draw(log.rows, out / "loss.png")
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    logits = exported_logits(params)
    card = describe(config, count, log.rows, tokenizer, logits, valid)
    export(TINY, params, tokenizer, card, out / "model")


def exported_logits(params: Any) -> Any:
    """The logits of the bfloat16 weights as exported, computed in float32."""
    plain, _ = functional(llama.Llama(TINY, rngs=nnx.Rngs(0)))
    rounded = jax.tree.map(
        lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32), params
    )
    return jax.jit(functools.partial(plain, rounded))


class Log:
    """JSON lines, one per step; those after the step that a run resumes from go."""

    def __init__(self, path: Path, step: int):
        lines = path.read_text().splitlines() if path.exists() else []
        rows = [json.loads(line) for line in lines]
        self.path, self.rows = path, [row for row in rows if row["step"] <= step]
        path.write_text("".join(json.dumps(row) + "\n" for row in self.rows))

    def add(self, **row: Any) -> None:
        """Write one step."""
        self.rows.append(row)
        with self.path.open("a") as file:
            print(json.dumps(row), file=file)


def run(config, steps, state, clock, blocks, valid, manager, log) -> Any:
    """Train until the budget is used up; returns the parameters."""
    step, loss = steps
    params, moments = state["params"], state["optimiser"]
    index, began = clock["step"], time.monotonic() - clock["seconds"]
    done, saved = progress(config, index, clock["seconds"]), time.monotonic()
    with Progress() as bar:
        task = bar.add_task("training", total=1.0)
        while done < 1.0:
            tokens = batch(config, blocks, index, done)
            scale = jnp.float32(rate(config, done))
            params, moments, value = step(params, moments, tokens, scale)
            value, index = round(float(value), 4), index + 1
            seconds = time.monotonic() - began
            done = progress(config, index, seconds)
            row = {"step": index, "tokens": index * config.batch_tokens}
            row |= {"seconds": round(seconds, 1), "loss": value}
            if time.monotonic() - saved > config.checkpoint_seconds or done >= 1.0:
                row["validation_loss"] = evaluate(loss, params, valid)
                save(manager, params, moments, index, seconds)
                saved = time.monotonic()
            log.add(**row, context=tokens.shape[1])
            bar.update(task, completed=min(done, 1.0), description=f"loss {value:.3f}")
    return params


def batch(config: Config, blocks: Blocks, step: int, done: float) -> jax.Array:
    """The tokens of a step, in sequences of the length that is due."""
    short = done < config.short_fraction
    context = config.short_context if short else config.context
    return jnp.asarray(blocks.batch(step).reshape(-1, context), jnp.int32)


def progress(config: Config, step: int, seconds: float) -> float:
    """The fraction of the budget that is used up."""
    return max(step / config.max_steps, seconds / config.max_seconds)


def evaluate(loss: Any, params: Any, valid: np.ndarray, batch: int = 8) -> float:
    """Mean loss per token, in nats, on the validation windows."""
    rows = [valid[i : i + batch] for i in range(0, len(valid), batch)]
    losses = [loss(params, jnp.asarray(row, jnp.int32)) for row in rows]
    return round(float(np.mean(losses)), 4)


def save(manager, params, optimiser_state, step: int, seconds: float) -> None:
    """Write a checkpoint of everything that a resumed run needs."""
    state = {"params": params, "optimiser": optimiser_state}
    items = {
        "state": ocp.args.StandardSave(state),
        "clock": ocp.args.JsonSave({"step": step, "seconds": seconds}),
    }
    manager.save(step, args=ocp.args.Composite(**items))
    manager.wait_until_finished()


def restore(manager: ocp.CheckpointManager, state: Any) -> tuple[Any, dict[str, Any]]:
    """The newest checkpoint's state and clock."""
    step = manager.latest_step()
    if step is None:
        raise FileNotFoundError(f"no checkpoint to resume from in {manager.directory}")
    items = {
        "state": ocp.args.StandardRestore(
            jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        ),
        "clock": ocp.args.JsonRestore(),
    }
    found = manager.restore(step, args=ocp.args.Composite(**items))
    return found["state"], found["clock"]


if __name__ == "__main__":
    train(tyro.cli(Config, description=__doc__))
