"""One small random Llama for every checkpoint format."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial, reduce
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.core.coded import Coded, encode, pack_codes
from qjax.core.formats import NVFP4, Format
from qjax.core.layout import Layout
from qjax.core.qtensor import QTensor, SiteActs, dequantize, is_quantized
from qjax.io.arrays import write_arrays
from qjax.io.huggingface import load_weights
from qjax.trace.apply import apply
from qjax.trace.paths import flatten_with_paths

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "attention_bias": True,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "dtype": "float32",
}
WIDTHS = {"gate_proj": (128, 64), "up_proj": (128, 64), "down_proj": (64, 128)}


def tensors() -> dict[str, np.ndarray]:
    """Random tensors of the shapes that torch's Llama has, exact in bfloat16."""
    shapes = {"model.embed_tokens.weight": (64, 64), "lm_head.weight": (64, 64)}
    for i in range(2):
        layer = f"model.layers.{i}."
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes[f"{layer}self_attn.{name}.weight"] = (64, 64)
            shapes[f"{layer}self_attn.{name}.bias"] = (64,)
        shapes |= {f"{layer}mlp.{name}.weight": s for name, s in WIDTHS.items()}
        shapes[layer + "input_layernorm.weight"] = (64,)
        shapes[layer + "post_attention_layernorm.weight"] = (64,)
    rng = np.random.default_rng(0)
    found = {n: 0.2 * rng.standard_normal(s, np.float32) for n, s in shapes.items()}
    found |= {n: 1 + v for n, v in found.items() if "norm" in n}
    found["model.norm.weight"] = np.ones(64, np.float32)
    return {n: v.astype(jnp.bfloat16).astype(np.float32) for n, v in found.items()}


@dataclass(frozen=True)
class Small:
    """The model: its folder, its function on stacked layers, and its parameters."""

    folder: Path
    f: Callable[..., Any]
    params: Any
    tokens: np.ndarray

    def quantized(
        self,
        format: Format | Callable[[str], Format | None],
        acts: Callable[[Any], SiteActs] | None = None,
        params: Any = None,
        alone: bool = False,
    ) -> Any:
        """Every linear of the layers in a format, or in one that depends on its path.

        `acts` gives what happens to the input of a leaf `[2, K, N]`. Those in NVFP4
        have one second scale for each layer, or each its own if they are `alone`.
        """
        params = self.params if params is None else params
        stacks = [
            jnp.abs(w).max((-2, -1), keepdims=True)
            for path, w in flatten_with_paths(params["layers"])
            if "kernel" in path
        ]
        largest = None if alone else reduce(jnp.maximum, stacks)

        def leaf(path: Any, w: Any) -> Any:
            name = "/".join(key.key for key in path)
            chosen = format(name) if callable(format) else format
            if not name.startswith("layers") or "kernel" not in name or not chosen:
                return w
            layout = Layout("kn", w.shape[-2:])
            records = () if acts is None else (acts(w),)
            coded = _encode(w, chosen, largest)
            return QTensor.of(coded, layout, w.dtype, records)

        return jax.tree_util.tree_map_with_path(leaf, params)

    def logits(self, params: Any) -> np.ndarray:
        """In float32; quantized inputs are coded, quantized weights decoded."""
        wide = jax.tree.map(_in_float32, params, is_leaf=is_quantized)
        leaves = jax.tree.leaves(wide, is_leaf=is_quantized)
        coded = any(is_quantized(leaf) and leaf.acts for leaf in leaves)
        if coded:
            return np.asarray(jax.jit(apply(self.f))(wide, self.tokens))
        return np.asarray(_run(self.f, dequantize(wide), self.tokens))


@partial(jax.jit, static_argnums=1)
def _encode(w: Any, format: Format, largest: Any) -> Coded:
    if largest is None or not isinstance(format, NVFP4):
        return encode(w, format)
    grid = format.fit(w, global_scale=format.global_scale(largest))
    return pack_codes(format.to_codes(w, grid), grid, format, w.shape[-2:])


_run = jax.jit(lambda f, params, tokens: f(params, tokens), static_argnums=0)


def _in_float32(leaf: Any) -> Any:
    if is_quantized(leaf):
        return replace(leaf, dtype=jnp.dtype("float32"))
    return jnp.asarray(leaf, jnp.float32)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    folder = tmp_path_factory.mktemp("small")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "generation_config.json").write_text('{"max_length": 20}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    with (folder / "model.safetensors").open("wb") as file:
        write_arrays(file, tensors(), "pt")
    f, params, _ = load_weights(folder, scan_layers=True)
    return Small(folder, f, params, np.arange(12, dtype=np.int32)[None])
