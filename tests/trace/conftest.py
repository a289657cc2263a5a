"""A streaming pass, opened; functions and models to send through it."""

import importlib.util
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qjax.core.statistics import Hessian
from qjax.leaves import Leaves
from qjax.models import architecture, functional
from qjax.models.fields import Fields
from qjax.observe import namer
from qjax.trace.program import is_arraylike, trace
from qjax.trace.rows import Accumulator, finalized, refusal
from qjax.trace.sites import sites
from qjax.trace.stream import Stream, find_points, lanes_of


def load(name):
    """A neighbour as a module; there are no packages below tests."""
    path = Path(__file__).with_name(f"{name}.py")
    spec = importlib.util.spec_from_file_location(f"trace_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tree(shapes, dtype=jnp.float32):
    """Nested parameters from `a/b` paths."""
    params = {}
    for i, (path, shape) in enumerate(shapes.items()):
        *heads, last = path.split("/")
        node = params
        for head in heads:
            node = node.setdefault(head, {})
        w = np.random.default_rng(i).normal(size=shape) / np.sqrt(shape[-2])
        node[last] = jnp.asarray(w, dtype)
    return params


def lanes(f, params, batches):
    return lanes_of(lambda batch: trace(f, params, batch), batches)


def open_stream(f, params, batches, wanted="", read=None, **options):
    """A pass at its start; `wanted` begins the names of the sites that stop it."""
    every = lanes(f, params, batches)
    name = namer(sites(f, params, *batches[0]), every[0].program)
    points = find_points(every, lambda key: name(key).startswith(wanted), name)
    leaves = Leaves(every[0].program.leaves)
    stream = Stream(every, points, read or leaves.read, **options)
    stream.start([[x for x in jax.tree.leaves(b) if is_arraylike(x)] for b in batches])
    return stream


def through(f, params, batches, **options):
    """The outputs of a pass in which nothing is solved."""
    stream = open_stream(f, params, batches, **options)
    for _ in stream:
        pass
    return stream.finish()


def error(got, want):
    """The largest difference of two outputs, relative to the largest value."""
    pairs = zip(got, jax.tree.leaves(want), strict=True)
    worst = [
        np.max(np.abs(np.float64(g) - np.float64(w)) / max(np.max(np.abs(w)), 1e-30))
        for g, w in pairs
        if w.size
    ]
    return max(worst, default=0.0)


def hessians(stream, masks=None):
    """`E[x x^T]` of every site, as the pass takes them, with the experts in front."""
    asked, found, accumulator = {"h": Hessian()}, {}, Accumulator()
    for point in stream:
        if refusal(point.meetings[0]):
            continue
        seen = accumulator.init(asked, point.meetings[0])
        for number, op, x, full, rest in stream.inputs(point):
            mask = None if masks is None else masks[number]
            seen = accumulator.update(asked, op, seen, x, full, rest, mask)
        found |= dict.fromkeys(point.names, np.asarray(finalized(asked, seen)["h"]))
    return found


SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "ffn_dim": 48,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
    "head_dim": 8,
}
NARROW = {"word_embed_proj_dim": 16, "do_layer_norm_before": False}
GEMMA = {"head_dim": 8, "sliding_window": 5, "sliding_window_pattern": 2}
MODELS = {
    "llama": ("llama", {}),
    "llama_tied": ("llama", {"tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": 5}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3_moe": ("qwen3_moe", EXPERTS),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gemma2": ("gemma2", {"head_dim": 8, "sliding_window": 5}),
    "gemma3_text": ("gemma3_text", GEMMA),
    "phi3": ("phi3", {"pad_token_id": 0}),
    "gpt2": ("gpt2", {}),
    "opt": ("opt", {}),
    "opt_350m": ("opt", NARROW),
    "bert": ("bert", {"num_key_value_heads": 4}),
}


def model(name, layers=2, dtype=jnp.float32, **options):
    """A small random model as `(f, params)`."""
    kind, extra = MODELS[name]
    fields = {**SMALL, **extra, "num_hidden_layers": layers, "n_layer": layers}
    built = architecture(kind)
    config = built.from_fields(Fields({"model_type": kind, **fields}))
    f, shapes = functional(
        nnx.eval_shape(lambda: built.build(config, rngs=nnx.Rngs(0), **options))
    )
    rng = np.random.default_rng(0)

    def drawn(path, x):
        spread = rng.normal(size=x.shape) / 8
        gain = "norm" in jax.tree_util.keystr(path) or "ln" in jax.tree_util.keystr(
            path
        )
        return jnp.asarray(gain + spread, dtype)

    return f, jax.tree_util.tree_map_with_path(drawn, shapes)


def tokens(rows, length, seed=0):
    drawn = np.random.default_rng(seed).integers(2, 97, (rows, length))
    return jnp.asarray(drawn, jnp.int32)


@pytest.fixture(scope="session")
def kit():
    """The helpers of this file."""
    names = (load, tree, lanes, open_stream, through, error, model, tokens, hessians)
    return types.SimpleNamespace(
        **{f.__name__: f for f in names},
        CASES=load("cases").CASES,
        KINDS={name: kind for name, (kind, _) in MODELS.items()},
    )
