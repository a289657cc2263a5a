"""Saved trees come back bit for bit; anything damaged is refused in a sentence."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from qjax.core.coded import Coded, encode
from qjax.core.formats import (
    MX,
    NVFP4,
    Binary,
    Codebook,
    Float,
    Format,
    Int,
    Ternary,
    block,
    group,
    token,
)
from qjax.core.layout import Layout
from qjax.core.lazy import LazyLeaf
from qjax.core.qtensor import Activation, QTensor, SiteActs, Sparse, Stacked
from qjax.core.sharding import partition_specs, shard
from qjax.core.transforms import Dense, Diagonal, Hadamard, Permutation
from qjax.io import folder as folder_module
from qjax.io.checkpoint import read_manifest, restore, save

FORMATS: list[Format] = [
    Int(3, group(32)),
    Int(4, group(16), zero="int"),
    Int(4, group(64), zero="float", scale_dtype="bfloat16"),
    Int(8, block(32, 16), scale_rule="narrow"),
    Float("e4m3"),
    Float("e5m2", group(32)),
    Float("e4m3b11"),
    MX("fp4"),
    MX("fp8_e4m3", scale_rule="ct"),
    NVFP4(),
    Codebook("nf4", double_quant=256),
    Codebook((-1.0, -0.1, 0.25, 1.0), group(32)),
    Ternary(group(32)),
]
K, N = 64, 32


def weights(*lead: int) -> jax.Array:
    values = np.random.default_rng(sum(lead)).normal(size=(*lead, K, N))
    return jnp.asarray(values, jnp.float32)


@cache
def encoder(format: Format) -> Callable[[jax.Array], Coded]:
    return jax.jit(lambda w: encode(w, format))


def quantized(format: Format, *lead: int) -> QTensor:
    coded = encoder(format)(weights(*lead))
    return QTensor.of(coded, Layout("kn", (K, N)), jnp.bfloat16)


def everything() -> QTensor:
    """A QTensor that uses every field."""
    acts = SiteActs(
        scale=jnp.float32(0.5),
        zero=jnp.int8(3),
        t_in=Hadamard(jnp.ones(K)),
        t_out=Permutation(jnp.arange(N)[::-1]),
        activation=Activation(Int(8, token()), dynamic=False),
    )
    other = SiteActs(t_in=Diagonal(jnp.ones(K)), t_out=Dense(jnp.eye(N)))
    parts = [encoder(format)(weights()) for format in (FORMATS[0], Binary())]
    return QTensor.of(
        parts,
        Layout("knn", (K, 4, 8)),
        jnp.float32,
        acts=(acts, other),
        left=encoder(Int(8))(jnp.ones((K, 2))),
        right=jnp.ones((2, N), jnp.bfloat16),
        sparse=Sparse(jnp.ones(3), jnp.arange(3), jnp.arange(3)),
        bias=jnp.zeros(N),
    )


def assert_same(restored, saved) -> None:
    assert jax.tree.structure(restored) == jax.tree.structure(saved)
    pairs = zip(jax.tree.leaves(restored), jax.tree.leaves(saved), strict=True)
    for found, wanted in pairs:
        assert jnp.asarray(found).dtype == jnp.asarray(wanted).dtype
        assert np.asarray(found).tobytes() == np.asarray(wanted).tobytes()
        assert np.shape(found) == np.shape(wanted)


@pytest.mark.parametrize("storage", ["safetensors", "orbax"])
def test_every_format_comes_back_bit_for_bit(tmp_path: Path, storage: str):
    tree = {format.name + str(i): quantized(format) for i, format in enumerate(FORMATS)}
    tree["experts"] = quantized(Int(4, group(32)), 2, 3)
    tree["all"] = everything()
    save(tmp_path / "m", tree, format=storage)
    restored = restore(tmp_path / "m")
    assert_same(restored, tree)
    assert [
        restored[f.name + str(i)].parts[0].format for i, f in enumerate(FORMATS)
    ] == (FORMATS)


class Pair(NamedTuple):
    first: jax.Array
    second: jax.Array


@pytest.mark.parametrize("storage", ["safetensors", "orbax"])
def test_containers_and_plain_leaves(tmp_path: Path, storage: str):
    parts = (quantized(Int(4), 2), quantized(Int(8), 1))
    tree = {
        "layers": [
            {"w": quantized(Int(2, group(32)))},
            {"w": jnp.ones(3, jnp.bfloat16)},
        ],
        "stacked": Stacked(parts, ((0, 2), (2, 3))),
        "plain": {3: (None, 1, 2.5, float("inf"), True, np.arange(4, dtype="int16"))},
        "empty": {"list": [], "array": jnp.zeros((0, 4)), "scalar": jnp.float32(7)},
        "e8m0": jnp.ones(4, jnp.float8_e8m0fnu),
        "e5m2": jnp.ones(4, jnp.float8_e5m2),
        "int4": jnp.arange(-8, 8, dtype=jnp.int4),
    }
    save(tmp_path / "m", tree, format=storage)
    assert_same(restore(tmp_path / "m"), tree)


def test_other_containers_become_dicts_of_paths_or_what_like_says(tmp_path: Path):
    tree = {"pair": Pair(quantized(Int(4)).parts[0].scale, jnp.ones(2))}
    save(tmp_path / "m", tree)
    restored = restore(tmp_path / "m")
    assert set(restored["pair"]) == {"first", "second"}
    assert_same(restore(tmp_path / "m", like=tree), tree)
    with pytest.raises(ValueError, match=r"differ in .*pair/third"):
        restore(tmp_path / "m", like={"pair": {"third": 0}})


def test_equinox_modules_and_flax_states(tmp_path: Path):
    linear = eqx.nn.Linear(K, N, key=jax.random.key(0))
    module = eqx.tree_at(lambda m: m.weight, linear, quantized(FORMATS[0]))
    state = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    tree = {"equinox": module, "flax": state}
    save(tmp_path / "m", tree)
    restored = restore(tmp_path / "m")
    assert restored["equinox"]["weight"].shape == (K, N)
    assert restored["flax"]["kernel"]["value"].shape == (2, 3)
    assert_same(restore(tmp_path / "m", like=tree), tree)


def test_names_that_collide_stay_apart(tmp_path: Path):
    tree = {"a/b": jnp.zeros(1), "a": {"b": jnp.ones(1)}, "../x": jnp.full(1, 2.0)}
    for storage in ("safetensors", "orbax"):
        save(tmp_path / storage, tree, format=storage)
        assert_same(restore(tmp_path / storage), tree)


def test_the_safetensors_library_reads_the_file(tmp_path: Path):
    save(tmp_path / "m", {"x": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(3, bool)})
    with safetensors.safe_open(tmp_path / "m" / "arrays.safetensors", "np") as file:
        assert sorted(file.keys()) == ["b", "x"]
        assert file.get_tensor("x").tolist() == [[0, 1, 2], [3, 4, 5]]


def test_lazy_leaves_are_read_when_their_turn_comes(tmp_path: Path):
    reads = []

    def read() -> jax.Array:
        reads.append(1)
        return jnp.full((2, 2), 3, jnp.bfloat16)

    save(tmp_path / "m", {"w": LazyLeaf((2, 2), jnp.bfloat16, read)})
    assert len(reads) == 1
    assert restore(tmp_path / "m")["w"].tolist() == [[3, 3], [3, 3]]


def test_sharded_trees_restore_on_a_mesh_and_on_one_device(tmp_path: Path):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    columns = NamedSharding(mesh, PartitionSpec(None, "x"))
    whole = NamedSharding(mesh, PartitionSpec())
    tree = {
        "w": jax.device_put(quantized(Int(4, group(32))), columns),
        "b": jnp.ones(3),
    }
    target = {"w": columns, "b": whole}
    for storage in ("safetensors", "orbax"):
        path = save(tmp_path / storage, tree, format=storage)
        placed = restore(path, sharding=target)
        assert_same(placed, tree)
        for leaf in jax.tree.leaves(placed["w"]):
            assert leaf.sharding == columns
        assert placed["b"].sharding == whole
        exact = restore(path, sharding=jax.tree.map(lambda x: x.sharding, tree))
        assert exact["w"].parts[0].scale.sharding == columns
        single = SingleDeviceSharding(jax.devices()[1])
        assert restore(path, sharding=single)["b"].sharding == single
    with pytest.raises(ValueError, match="prefix of the saved tree"):
        restore(path, sharding={"v": whole})
    with pytest.raises(ValueError, match="no Sharding"):
        restore(path, sharding=PartitionSpec())


def test_training_state_restores_on_another_mesh(tmp_path: Path):
    """Frozen QTensors beside adapters and what an optimiser keeps of them."""
    auto = (jax.sharding.AxisType.Auto,) * 2
    before = jax.make_mesh((4, 2), ("data", "model"), axis_types=auto)
    after = jax.make_mesh((2, 4), ("data", "model"), axis_types=auto)
    leaf = quantized(Int(4, group(16), zero="int"), 2)
    adapters = {"a": jnp.arange(64.0).reshape(8, 8), "b": jnp.ones((8, 8))}
    state = {
        "frozen": {"w": shard(leaf, PartitionSpec(None, None, "model"), before)},
        "adapters": jax.device_put(
            adapters, NamedSharding(before, PartitionSpec("data"))
        ),
        "optimiser": optax.adam(1e-3).init(adapters),
        "step": jnp.int32(7),
    }
    columns = partition_specs(leaf, PartitionSpec(None, "data", "model"), after)
    place = lambda spec: NamedSharding(after, spec)
    whole = place(PartitionSpec())
    target = {
        "frozen": {"w": jax.tree.map(place, columns)},
        "adapters": place(PartitionSpec("data", "model")),
        "optimiser": whole,
        "step": whole,
    }
    for storage in ("safetensors", "orbax"):
        path = save(tmp_path / storage, state, format=storage)
        found = restore(path, sharding=target)
        for name in ("frozen", "adapters", "step"):
            assert_same(found[name], state[name])
        # Named tuples come back as dicts, in the same order.
        leaves = [jax.tree.leaves(each["optimiser"]) for each in (found, state)]
        assert_same(*leaves)
        codes = found["frozen"]["w"].parts[0].codes
        assert codes.addressable_shards[0].data.shape == (2, K * 4 // 32 // 2, N // 4)
        assert found["adapters"]["a"].addressable_shards[0].data.shape == (4, 2)
        assert found["step"].sharding == whole


@dataclass(frozen=True)
class Recipe:
    bits: int = 4
    format: Format = FORMATS[0]


def test_manifest_tells_the_recipe_versions_and_metadata(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    save(
        tmp_path / "m",
        {"x": jnp.ones(1)},
        recipe=(Recipe(),),
        metadata={"model": "tiny", "shape": (1, None)},
        files={"hf/config.json": tmp_path / "config.json"},
    )
    body = read_manifest(tmp_path / "m")
    assert body["recipe"][0]["class"] == "Recipe"
    assert body["recipe"][0]["format"]["class"] == "Int"
    assert body["metadata"] == {"model": "tiny", "shape": [1, None]}
    assert body["versions"]["jax"] == jax.__version__
    assert set(body["files"]) == {"arrays.safetensors", "hf/config.json"}
    restore(tmp_path / "m")
    (tmp_path / "m/hf/config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json was changed"):
        restore(tmp_path / "m")


def listing(path: Path) -> list[str]:
    return sorted(p.relative_to(path).as_posix() for p in path.rglob("*"))


def test_an_existing_folder_is_replaced_only_on_request(tmp_path: Path):
    save(tmp_path / "m", {"x": jnp.zeros(1)})
    with pytest.raises(FileExistsError, match="overwrite=True"):
        save(tmp_path / "m", {"x": jnp.ones(1)})
    save(tmp_path / "m", {"x": jnp.ones(1)}, overwrite=True)
    assert restore(tmp_path / "m")["x"] == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["m"]
    (tmp_path / "link").symlink_to(tmp_path / "m")
    save(tmp_path / "link", {"x": jnp.full(1, 2.0)}, overwrite=True)
    assert restore(tmp_path / "m")["x"] == 2
    (tmp_path / "photos").mkdir()
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match="not saved by qjax, so it is never"):
            save(tmp_path / "photos", {"x": jnp.ones(1)}, overwrite=overwrite)


@pytest.mark.parametrize("storage", ["safetensors", "orbax"])
def test_a_save_that_fails_leaves_the_old_folder_and_nothing_else(
    tmp_path: Path, storage: str
):
    class Unreadable:
        shape, dtype = (1,), np.dtype("float32")

        def read(self):
            raise OSError("disk gone")

    save(tmp_path / "m", {"x": jnp.zeros(1)})
    before = listing(tmp_path)
    with pytest.raises(OSError, match="disk gone"):
        save(tmp_path / "m", {"x": Unreadable()}, format=storage, overwrite=True)
    assert listing(tmp_path) == before
    assert restore(tmp_path / "m")["x"] == 0


def test_a_rename_that_fails_brings_the_old_folder_back(tmp_path: Path, monkeypatch):
    save(tmp_path / "m", {"x": jnp.zeros(1)})
    before = listing(tmp_path)
    rename = folder_module.Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name == "new":
            raise OSError("no space")
        return rename(self, target)

    monkeypatch.setattr(folder_module.Path, "rename", failing)
    with pytest.raises(OSError, match="no space"):
        save(tmp_path / "m", {"x": jnp.ones(1)}, overwrite=True)
    assert listing(tmp_path) == before
    assert restore(tmp_path / "m")["x"] == 0


def test_an_empty_tree(tmp_path: Path):
    save(tmp_path / "m", {})
    assert restore(tmp_path / "m") == {}
    with pytest.raises(ValueError, match="no array"):
        save(tmp_path / "n", {}, format="orbax")


def test_64_bit_leaves_are_not_narrowed_in_silence(tmp_path: Path):
    save(tmp_path / "m", {"x": np.ones(1, np.float64)})
    with pytest.raises(ValueError, match=r"leaf x is float64.*jax_enable_x64"):
        restore(tmp_path / "m")
    with jax.enable_x64(True):
        assert restore(tmp_path / "m")["x"].dtype == jnp.float64
