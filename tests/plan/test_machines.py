"""Names of machines, schemes and models; who holds what."""

import jax
import jax.numpy as jnp
import pytest

from qjax.core.qtensor import is_quantized
from qjax.plan import layouts
from qjax.plan.compilers import find_compiler
from qjax.plan.machines import machine
from qjax.plan.placing import make_mesh, per_device, place_cache, place_params, spec
from qjax.plan.report import unknown
from qjax.plan.serving import serving
from qjax.plan.shapes import nbytes, quantized_shapes
from qjax.plan.steps import Load, make_step
from qjax.trace.paths import flatten_with_paths


def test_names_are_written_in_any_letters():
    assert machine("TPU7x:2x2x1").name == machine("V7X:2x2x1").name == "v7x:2x2x1"
    assert machine("H200:1").name == machine("h200").name == "h200"
    assert layouts.layout("llama-3-8b").name == "Llama-3-8B"
    assert serving("BF16-kv8").name == "bf16-KV8"


def test_known_machines():
    assert machine("v6e:2x4").devices == 8
    assert machine("tpu7x:2x2x1").devices == 8  # two TensorCores a chip
    assert machine("h200:8").topology == "1x1x8"
    v5e = machine("v5e:2x4").chip
    assert (v5e.peak("bfloat16"), v5e.peak("int8")) == (197e12, 394e12)
    assert machine("tpu7x:2x2x1").chip.peak("int8") == v5e.peak("bfloat16") / 197 * 1155


# Of a chip: bf16 operations per second, GiB, GB/s, and GB/s of all links both ways:
# docs.cloud.google.com/tpu/docs/{v5e,v5p,v6e,tpu7x}.
PAGES = {
    "v5e:1x1": (197e12, 16, 819, 400),
    "v5p:1x1x1": (459e12, 95, 2765, 1200),
    "v6e:1x1": (918e12, 32, 1638, 800),
    "v7x:1x1x1": (2307e12, 192, 7380, 1200),
}


@pytest.mark.parametrize("name", PAGES)
def test_a_chip_is_what_google_says_of_it(name: str):
    """Devices of a chip add up to it; JAX rounds, and never below what is published."""
    found, (peak, memory, bandwidth, links) = machine(name), PAGES[name]
    chip, n = found.chip, found.devices
    assert n == found.per_chip == (2 if "v7x" in name else 1)
    assert peak <= n * chip.peak("bfloat16") <= 1.005 * peak
    assert n * chip.memory / 2**30 == pytest.approx(memory, rel=0.01)
    assert bandwidth * 1e9 <= n * chip.bandwidth <= 1.005 * bandwidth * 1e9
    assert 2 * n * chip.link == links * 1e9


def test_a_chip_of_two_devices_is_said_to_be_one():
    four = machine("v7x:2x2x1").said
    assert four == "8 x 95.9 GiB, 3,700 GB/s (2 devices on each of 4 chips)"
    assert machine("v7x:1x1x1").said.endswith("(2 devices on each of 1 chip)")
    assert machine("v5e:2x4").said == "8 x 16.0 GiB, 820 GB/s"
    assert len(unknown(machine("v7x:1x1x1"))) == len(unknown(machine("v5e:1x1"))) + 1


@pytest.mark.parametrize("name", ["v5e", "v5e:2x2x2", "v6e:0x4", "a100", "h200:3", ""])
def test_other_machines_are_refused(name: str):
    with pytest.raises(ValueError, match=r"--topology is .*valid are names such as"):
        machine(name)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("v5e:3x5", "1x1, 2x2, 2x4, .*16x16$"),
        ("v5e:4x2", "2x4"),
        ("v6e:999x999", "16x16$"),
        (
            "v5p:2x3x4",
            "2x4x4 and AxBxC in multiples of 4, A <= B <= C, up to 6144",
        ),
        ("tpu7x:16x24x28", "up to 9216 chips"),
    ],
)
def test_sizes_that_a_generation_lacks_are_refused(name: str, sizes: str):
    size = name.partition(":")[2]
    with pytest.raises(ValueError, match=rf"has no slices of {size}; it has .*{sizes}"):
        machine(name)


def test_cubes_make_larger_machines():
    assert machine("v5p:4x4x12").devices == 192
    assert machine("v5p:16x16x24").devices == 6144
    assert machine("tpu7x:16x24x24").devices == 2 * 9216


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("W5A17", "valid are bf16, W2A16"),
        ("W4A16-KV3", "valid caches are KV8, KVFP8"),
        ("FP8", "ranges from calibration data"),
    ],
)
def test_other_schemes_are_refused(name: str, why: str):
    with pytest.raises(ValueError, match=why):
        serving(name)


def test_other_models_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="by name are bundled, Llama-3-8B"):
        layouts.layout("no/such-model")
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        layouts.layout(str(tmp_path))
    bert = {"model_type": "bert", "vocab_size": 64, "hidden_size": 32}
    bert |= {"num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 64}
    bert["max_position_embeddings"] = 32
    with pytest.raises(ValueError, match="no key-value cache"):
        layouts.from_fields("encoder", bert)


def test_loads_are_checked():
    with pytest.raises(ValueError, match="--batch is 0"):
        Load("decode", 0, 8, 8)
    with pytest.raises(ValueError, match="--context is 3000000000"):
        Load("decode", 1, 3 * 10**9, 8)
    with pytest.raises(ValueError, match="--prompt is 9"):
        Load("decode", 1, 8, 9)


def test_a_missing_compiler_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.prefix", str(tmp_path))
    with pytest.raises(
        ValueError, match=r"pip install --no-deps --target .*libtpu=="
    ) as e:
        find_compiler("tpu")
    assert "\n" not in str(e.value)
    (tmp_path / "libtpu" / "libtpu").mkdir(parents=True)
    assert find_compiler("tpu") == tmp_path / "libtpu"


@pytest.mark.parametrize(
    ("name", "weights"), [("Llama-3-8B", 8.03e9), ("Llama-3-70B", 70.55e9)]
)
def test_named_layouts_have_their_weights(name: str, weights: float):
    """The published sizes, and the shapes that the kernels are tuned for."""
    found = layouts.layout(name)
    assert found.weights == pytest.approx(weights, rel=1e-3)


def test_every_named_layout_is_read():
    sizes = {name: layouts.layout(name).weights / 1e9 for name in layouts.NAMED}
    published = {"Mixtral-8x7B": 46.7, "Qwen3-8B": 8.19, "Qwen3-30B-A3B": 30.5}
    published |= {"Qwen3-32B": 32.8, "Qwen3-0.6B": 0.596}
    for name, size in published.items():
        assert sizes[name] == pytest.approx(size, rel=0.01)


FIELDS = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}


@pytest.mark.parametrize("scheme", [None, "W4A16"])
def test_devices_hold_equal_shares(scheme: str | None):
    """All that is cut is an eighth; norms are whole."""
    f, params = layouts.from_fields("small", FIELDS).shapes()
    params = params if scheme is None else quantized_shapes(f, params, scheme)
    mesh = make_mesh(jax.devices(), 4)
    assert dict(mesh.shape) == {"heads": 4, "rest": 2}
    found = nbytes(per_device(place_params(params, mesh)))
    exact = 0
    for path, leaf in flatten_with_paths(params):
        size = leaf.nbytes if is_quantized(leaf) else nbytes(leaf)
        exact += size if "norm" in path else size // 8
    assert found == exact
    assert spec("layers/norm/scale", 2) == jax.sharding.PartitionSpec()


@pytest.mark.parametrize(("batch", "context"), [(6, 64), (1, 64)])
def test_caches_are_cut_by_heads_then_sequences_then_slots(batch: int, context: int):
    f, _ = layouts.from_fields("small", FIELDS).shapes()
    mesh = make_mesh(jax.devices(), 4)
    for dtype in (jnp.bfloat16, jnp.int8):
        cache = jax.eval_shape(lambda d=dtype: f.init_cache(batch, context, d))
        held = per_device(place_cache(cache, mesh))
        assert 8 * nbytes(held.k) == nbytes(cache.k)
    odd = jax.eval_shape(lambda: f.init_cache(1, 63, jnp.int8))
    with pytest.raises(ValueError, match="does not split 2 ways"):
        place_cache(odd, mesh)


GPT2 = {"model_type": "gpt2", "vocab_size": 512, "n_embd": 1024, "n_layer": 2}
GPT2 |= {"n_head": 8, "n_positions": 64}
OPT = {"model_type": "opt", "vocab_size": 512, "hidden_size": 1024, "ffn_dim": 2048}
OPT |= {"num_hidden_layers": 2, "num_attention_heads": 8, "word_embed_proj_dim": 1024}
OPT |= {"max_position_embeddings": 64, "do_layer_norm_before": True}


@pytest.mark.parametrize("fields", [GPT2, OPT, FIELDS], ids=lambda f: f["model_type"])
@pytest.mark.parametrize("scheme", ["bf16", "W4A16-KV8"])
def test_a_step_of_every_kind_of_attention(fields, scheme: str):
    """Heads are counted in the cache, whatever a model's configuration calls them."""
    layout, place = layouts.from_fields("small", fields), machine("v5e:2x4")
    load = Load("decode", 4, 32, 8)
    step = make_step(layout, serving(scheme), place, load, jax.devices())
    cache, heads = step.arguments[1], fields.get("num_key_value_heads", 8)
    assert {x.sharding.mesh.shape["heads"] for x in jax.tree.leaves(cache)} == {heads}
    tokens, _ = jax.eval_shape(step.f, *step.arguments)
    assert tokens.shape == (4,)


def test_the_bundled_model_has_a_name():
    assert layouts.layout("bundled").weights == pytest.approx(7.3e6, rel=0.01)


def test_an_odd_vocabulary_is_whole():
    _, params = layouts.from_fields("small", FIELDS | {"vocab_size": 509}).shapes()
    placed = place_params(params, make_mesh(jax.devices(), 4))
    assert placed["embed"]["embedding"].sharding.is_fully_replicated
    assert not placed["layers"]["mlp"]["up_proj"]["kernel"].sharding.is_fully_replicated


def test_a_group_is_not_cut():
    f, params = layouts.from_fields("small", FIELDS | {"hidden_size": 512}).shapes()
    params = quantized_shapes(f, params, "W4A16")
    with pytest.raises(ValueError, match=r"o_proj/kernel on 8 devices.*whole groups"):
        place_params(params, make_mesh(jax.devices(), 4))
