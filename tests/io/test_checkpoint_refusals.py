"""Anything damaged, forged, or not storable is refused in a sentence."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.core.coded import encode
from qjax.core.formats import Int
from qjax.core.layout import Layout
from qjax.core.lazy import LazyLeaf
from qjax.core.qtensor import QTensor
from qjax.io.checkpoint import (
    MANIFEST,
    _digest_of,
    holds_quantized,
    read_manifest,
    restore,
    save,
)


def quantized() -> QTensor:
    coded = jax.jit(lambda w: encode(w, Int(4)))(jnp.ones((32, 8)))
    return QTensor.of(coded, Layout("kn", (32, 8)), jnp.float32)


def listing(path: Path) -> list[str]:
    return sorted(p.relative_to(path).as_posix() for p in path.rglob("*"))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save(tmp_path / "m", {"w": quantized()})


def test_every_file_of_either_storage_is_guarded(tmp_path: Path):
    """Truncating, changing or removing any one file is noticed."""
    for storage in ("safetensors", "orbax"):
        original = save(tmp_path / storage, {"w": quantized()}, format=storage)
        for name in [p for p in listing(original) if (original / p).is_file()]:
            for damage in (truncate, flip_a_bit, Path.unlink):
                copy = tmp_path / "copy"
                shutil.copytree(original, copy)
                damage(copy / name)
                with pytest.raises((ValueError, FileNotFoundError)) as caught:
                    restore(copy)
                assert Path(name).name in str(caught.value)
                assert "\n" not in str(caught.value)
                shutil.rmtree(copy)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    if not data:
        data = bytearray(b"\0")
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


def rewrite(folder: Path, **changes) -> None:
    """A manifest changed by someone who also renews its checksum."""
    body = json.loads((folder / MANIFEST).read_text())
    body.pop("checksum")
    body |= changes
    (folder / MANIFEST).write_text(json.dumps({**body, "checksum": _digest_of(body)}))


def test_an_unknown_version_is_named(saved: Path):
    rewrite(saved, format_version=2)
    with pytest.raises(ValueError, match="has format version 2; this qjax reads 1"):
        restore(saved)


@pytest.mark.parametrize(
    "name", ["../secret", "{outside}", "link", "a/../../secret", ""]
)
def test_names_that_lead_out_of_the_folder_are_refused(saved: Path, name: str):
    (saved.parent / "secret").write_text("x")
    (saved / "link").symlink_to(saved.parent / "secret")
    name = name.format(outside=saved.parent / "secret")
    files = read_manifest(saved)["files"]
    rewrite(saved, files=files | {name: {"bytes": 1, "sha256": ""}})
    with pytest.raises(ValueError, match="not the name of a file inside"):
        restore(saved)
    with pytest.raises(ValueError, match="not the name of a file inside"):
        save(saved.parent / "n", {}, files={"../n": saved.parent / "secret"})


def test_storage_and_arrays_of_a_forged_manifest_are_checked(saved: Path):
    body = read_manifest(saved)
    rewrite(saved, storage="pickle")
    with pytest.raises(ValueError, match="storage 'pickle'"):
        restore(saved)
    rewrite(saved, storage="safetensors", files={})
    with pytest.raises(ValueError, match="no checksum"):
        restore(saved)
    rewrite(saved, files=body["files"], arrays=body["arrays"] | {"x": ["int8", [1]]})
    with pytest.raises(ValueError, match="does not hold the arrays"):
        restore(saved)
    wider = {name: [dtype, [*s, 9]] for name, (dtype, s) in body["arrays"].items()}
    rewrite(saved, arrays=wider)
    with pytest.raises(ValueError, match="size unlike"):
        restore(saved)
    rewrite(saved, arrays=body["arrays"], tree={"record": "os.system", "fields": {}})
    with pytest.raises(ValueError, match=r"record 'os\.system'"):
        restore(saved)
    rewrite(saved, tree={"surprise": 1})
    with pytest.raises(ValueError, match="'surprise'"):
        restore(saved)
    rewrite(saved, tree={"array": "missing"})
    with pytest.raises(ValueError, match="'missing'"):
        restore(saved)


def test_a_folder_that_qjax_did_not_save(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        restore(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"has no qjax\.json"):
        restore(tmp_path)


@pytest.mark.parametrize(
    ("tree", "sentence"),
    [
        ({"layers": [{"act": jnp.tanh}]}, "leaf layers/0/act is a"),
        (
            {"x": jax.ShapeDtypeStruct((1,), "float32")},
            "leaf x has a shape but no values",
        ),
        ({"key": jax.random.key(0)}, "leaf key is a random key"),
        ({"a": {1.5: 0}}, "a has the key 1.5"),
        ({"z": np.zeros(1, np.complex128)}, "leaf z is complex128"),
    ],
)
def test_what_cannot_be_saved_is_named(tmp_path: Path, tree, sentence: str):
    with pytest.raises(TypeError, match=sentence):
        save(tmp_path / "m", tree)
    assert list(tmp_path.iterdir()) == []


def test_bad_arguments_are_named(tmp_path: Path):
    with pytest.raises(ValueError, match="format is 'pickle'"):
        save(tmp_path / "m", {}, format="pickle")
    with pytest.raises(TypeError, match="metadata must hold JSON values"):
        save(tmp_path / "m", {}, metadata={"x": object()})
    with pytest.raises(ValueError, match="a name that save itself uses"):
        save(tmp_path / "m", {}, files={MANIFEST: __file__})
    with pytest.raises(TypeError, match="leaf x is uint4, which Orbax cannot hold"):
        save(tmp_path / "m", {"x": jnp.ones(2, jnp.uint4)}, format="orbax")


@pytest.mark.parametrize("storage", ["safetensors", "orbax"])
def test_the_name_that_safetensors_keeps_is_refused(tmp_path: Path, storage: str):
    with pytest.raises(ValueError, match="root has the key '__metadata__'"):
        save(tmp_path / "m", {"__metadata__": np.ones(2)}, format=storage)
    assert list(tmp_path.iterdir()) == []
    below = {"a": {"__metadata__": np.ones(2, np.float32)}}
    back = restore(save(tmp_path / "m", below, format=storage))
    np.testing.assert_array_equal(back["a"]["__metadata__"], np.ones(2))


def test_whether_a_folder_is_quantized(saved: Path):
    assert holds_quantized(saved)
    assert not holds_quantized(save(saved.parent / "n", {"w": np.ones(2)}))


def test_a_lazy_leaf_must_be_what_it_announced(tmp_path: Path):
    leaf = LazyLeaf((2,), np.dtype("float32"), lambda: jnp.ones(3))
    with pytest.raises(ValueError, match=r"leaf w was read as .*, not as announced"):
        save(tmp_path / "m", {"w": leaf})
