"""Eight host devices, no network, repeatable examples, and a tiny Llama."""

import gc
import json
import os
from pathlib import Path

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

# Most of the time goes into compiling: tests, and the processes that they start, do it
# quickly. Files marked `optimized` compile as users do.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

# A key for every program costs a tenth of the time that compiling it takes, even where
# no folder is named to keep it in.
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "0")

import hypothesis
import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

# A first call compiles, so a deadline would measure XLA; random examples would
# make a failure on one machine impossible to see on another.
hypothesis.settings.register_profile(
    "qjax", deadline=None, derandomize=True, database=None
)
hypothesis.settings.load_profile("qjax")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """Files that XLA optimizes come last: others keep what was compiled before them."""
    items.sort(key=lambda item: item.get_closest_marker("optimized") is not None)


gc.disable()  # until all is imported


def pytest_collection_finish():
    """What was imported stays: the collector looks at what tests make."""
    gc.freeze()
    gc.enable()


MAPS = Path("/proc/self/maps")


@pytest.fixture(autouse=True, scope="module")
def compiler(request):
    """XLA as users run it where a file asks for it, else without optimizations."""
    quick = request.node.get_closest_marker("optimized") is None
    if jax.config.read("jax_disable_most_optimizations") != quick:
        jax.config.update("jax_disable_most_optimizations", quick)
        jax.clear_caches()  # of programs that were compiled the other way
    yield
    # Every program that is kept maps memory; LLVM crashes when Linux gives a process no
    # more maps (65,530).
    if MAPS.exists() and MAPS.read_text().count("\n") > 25_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def strict():
    """Strict dtype promotion: an int8 silently multiplied by float32 fails."""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture
def largest_float():
    """`size(f, *at)` of the largest float array that a program makes."""
    # Here, after the options above: it imports qjax.
    from qjax.trace import compat

    def made(jaxpr):
        for eqn in jaxpr.eqns:
            yield from (v.aval for v in eqn.outvars if hasattr(v.aval, "shape"))
            for value in jax.tree.leaves(eqn.params, is_leaf=compat.is_jaxpr):
                if compat.is_jaxpr(value):
                    yield from made(compat.body(value)[0])

    def size(f, *at):
        arrays = made(jax.make_jaxpr(f)(*at).jaxpr)
        return max(a.size for a in arrays if jax.numpy.issubdtype(a.dtype, np.floating))

    return size


# Every projection is 64 x 64: one shape, one compilation per recipe.
VOCABULARY, FEATURES, LAYERS, CONTEXT = 128, 64, 2, 64
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": FEATURES,
    "intermediate_size": FEATURES,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "hidden_act": "silu",
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "dtype": "float32",
}


def weights():
    draw = np.random.default_rng(0)
    shapes = {"model.embed_tokens.weight": (VOCABULARY, FEATURES)}
    for layer in range(LAYERS):
        block = f"model.layers.{layer}."
        for name in ("q", "k", "v", "o"):
            shapes[f"{block}self_attn.{name}_proj.weight"] = (FEATURES, FEATURES)
        for name in ("gate", "up", "down"):
            shapes[f"{block}mlp.{name}_proj.weight"] = (FEATURES, FEATURES)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{block}{norm}.weight"] = (FEATURES,)
    shapes["model.norm.weight"] = (FEATURES,)
    return {
        name: np.ones(shape, np.float32)
        if len(shape) == 1
        else draw.normal(0, 0.2, shape).astype(np.float32)
        for name, shape in shapes.items()
    }


def tokenizer():
    """One token per ASCII character."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    table = {chr(code): code for code in range(VOCABULARY)}
    made = Tokenizer(models.WordLevel(table, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Hugging Face folder of a randomly initialised Llama."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG))
    save_file(weights(), path / "model.safetensors", metadata={"format": "pt"})
    tokenizer().save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "?"})
    )
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    draw = np.random.default_rng(1)
    path.write_text("".join(chr(97 + code) for code in draw.integers(0, 26, 700)))
    return path
