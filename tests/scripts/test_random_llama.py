"""Random Llama folders: what they hold, what it takes to write them."""

import json
import sys
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from transformers import AutoModelForCausalLM

sys.path.append(str(Path(__file__).parents[2] / "scripts"))
import random_llama

from qjax.io.huggingface import load_model
from qjax.io.shards import open_shards

torch = pytest.importorskip("torch")
# torch's own, when transformers first imports its compiler.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")


def write(folder: Path, **options) -> Path:
    options = {"size": "tiny", "shard_bytes": 100_000, **options}
    random_llama.main(random_llama.Options(out=folder, **options))
    return folder


@pytest.mark.parametrize("tied", [True, False])
def test_both_libraries_read_it_alike(tmp_path, tied):
    folder = write(tmp_path / "model", tied=tied)
    assert len(list(folder.glob("*.safetensors"))) > 1
    f, params, tokenizer, config = load_model(folder, dtype=np.float32)
    assert tokenizer is None
    assert config.tied == tied
    tokens = np.arange(24).reshape(2, 12) * 7
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens)).logits.numpy()
    np.testing.assert_allclose(
        f(params, jnp.asarray(tokens)), expected, rtol=0, atol=2e-5
    )


def test_a_seed_makes_a_folder(tmp_path):
    one, same, other = (
        open_shards(write(tmp_path / name, seed=seed, shard_bytes=size))
        for name, seed, size in (("a", 1, 10_000), ("b", 1, 10**9), ("c", 2, 10**9))
    )
    assert one.keys() == same.keys()
    for name in one:
        np.testing.assert_array_equal(one[name].view(), same[name].view())
    weight = "model.layers.1.mlp.up_proj.weight"
    assert not np.array_equal(same[weight].view(), other[weight].view())


def test_matrices_keep_the_size_of_what_passes():
    w = random_llama.draw("model.layers.0.mlp.down_proj.weight", (512, 1024), 0)
    assert w.dtype == ml_dtypes.bfloat16
    w = w.astype(np.float32)
    assert abs(w.std() * 32 - 1) < 0.01
    assert abs(w.mean()) < 1e-4


def test_sizes_are_those_of_llama_3():
    counts = {"1b": 1_235_814_400, "3b": 3_212_749_824, "8b": 8_030_261_248}
    for name, count in counts.items():
        shapes = random_llama.shapes(random_llama.SIZES[name])
        assert sum(int(np.prod(shape)) for shape in shapes.values()) == count


def test_one_tensor_at_a_time(tmp_path):
    alive, most = set(), []

    class Held(np.ndarray):
        def __del__(self):
            alive.discard(id(self))

    def read():
        made = np.ones((4, 4), np.float32).view(Held)
        alive.add(id(made))
        most.append(len(alive))
        return made

    tensors = {
        f"t{i}": random_llama.Pending((4, 4), np.dtype("float32"), read)
        for i in range(9)
    }
    random_llama.write_shards(tmp_path, tensors, shard_bytes=200)
    assert max(most) <= 2  # the one before is let go when the next is there
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 9 * 64
    assert set(index["weight_map"]) == set(tensors)


def test_weights_are_never_overwritten(tmp_path):
    write(tmp_path)
    with pytest.raises(FileExistsError, match="choose another folder"):
        write(tmp_path)
