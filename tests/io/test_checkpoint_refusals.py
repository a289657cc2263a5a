"""Anything damaged, forged, or not storable is refused in a sentence."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.core.coded import encode
from qjax.core.formats import NVFP4, Codebook, Int, group, token
from qjax.core.layout import Layout
from qjax.core.lazy import LazyLeaf
from qjax.core.qtensor import (
    Activation,
    QTensor,
    SiteActs,
    Sparse,
    dequantize,
    is_quantized,
)
from qjax.core.transforms import Diagonal
from qjax.io.arrays import read_arrays
from qjax.io.checkpoint import (
    MANIFEST,
    _digest_of,
    holds_quantized,
    read_manifest,
    restore,
    save,
)
from qjax.io.treespec import decode


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
    with pytest.raises(ValueError, match="a Coded whose codes is an array uint32"):
        restore(saved)
    plain = save(saved.parent / "plain", {"w": np.ones(2, np.float32)})
    rewrite(plain, arrays={"w": ["float32", [3]]})
    with pytest.raises(ValueError, match="size unlike"):
        restore(plain)
    rewrite(saved, arrays=body["arrays"], tree={"record": "os.system", "fields": {}})
    with pytest.raises(ValueError, match=r"record 'os\.system'"):
        restore(saved)
    rewrite(saved, tree={"surprise": 1})
    with pytest.raises(ValueError, match="'surprise'"):
        restore(saved)
    rewrite(saved, tree={"array": "missing"})
    with pytest.raises(ValueError, match="'missing'"):
        restore(saved)


FIELDS = ("storage", "versions", "recipe", "metadata", "arrays", "files", "tree")
OTHERS = (None, [], {}, "x", 1, [["w", 1]], {"w": {}}, {"w": None}, {"w": [1, 2]})


@pytest.mark.parametrize("name", FIELDS)
def test_fields_of_a_forged_manifest_are_checked(saved: Path, name: str):
    """Of every kind, or missing: read as they are, or refused in a sentence."""
    original = read_manifest(saved)
    lacking = {key: value for key, value in original.items() if key != name}
    (saved / MANIFEST).write_text(json.dumps(lacking | {"checksum": ""}))
    rewrite(saved)
    with pytest.raises(ValueError, match=f"is damaged: it has no {name}"):
        restore(saved)
    for value in OTHERS:
        rewrite(saved, **(original | {name: value}))
        for read in (restore, holds_quantized):
            try:
                read(saved)
            except (ValueError, FileNotFoundError) as error:
                assert str(error) and "\n" not in str(error)
    for part, entry in (("files", {}), ("arrays", ["int8", [-1]]), ("arrays", "x")):
        forged = original[part] | {next(iter(original[part])): entry}
        rewrite(saved, **(original | {part: forged}))
        with pytest.raises(ValueError, match=f"is damaged: {part} has "):
            restore(saved)


def test_brackets_without_end(saved: Path):
    whole = (saved / MANIFEST).read_bytes()
    (saved / MANIFEST).write_bytes(b"[" * 100_000)
    with pytest.raises(ValueError, match="nested too deeply"):
        restore(saved)
    (saved / MANIFEST).write_bytes(whole)
    tree: dict = {"list": []}
    for _ in range(150):
        tree = {"list": [tree]}
    rewrite(saved, tree=tree)
    with pytest.raises(ValueError, match="nested more than 200 deep"):
        restore(saved)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"[" * 100_000, "is no JSON: it is nested too deeply"),
        (b"[]", "is damaged: it is no JSON object"),
        (b'{"w": {}}', "is damaged: w is {}"),
        (b'{"w": 1}', "is damaged: w is 1"),
        (b'{"w": {"data_offsets": [0]}}', "is damaged: w is"),
        (b'{"w": {"data_offsets": [0, "8"]}}', "is damaged: w is"),
        (b'{"w": {"data_offsets": [0, 9]}}', "holds w with a size unlike"),
    ],
)
def test_headers_of_damaged_arrays(tmp_path: Path, header: bytes, message: str):
    file = tmp_path / "a.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(ValueError, match=re.escape(message)):
        read_arrays(file, {"w": ("float32", (2,))})


def places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value inside nested JSON."""
    pairs = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in pairs:
        yield (*path, key)
        if isinstance(value, (dict, list)):
            yield from places(value, (*path, key))


def changed(node: Any, path: tuple[Any, ...], value: Any) -> Any:
    copy = dict(node) if isinstance(node, dict) else list(node)
    key, *rest = path
    copy[key] = changed(node[key], tuple(rest), value) if rest else value
    return copy


def rich() -> dict[str, Any]:
    """Records of most kinds; no matrix is square."""
    w = jnp.asarray(np.random.default_rng(0).normal(size=(32, 8)), jnp.float32)
    layout = Layout("kn", (32, 8))

    def coded(format: Any) -> Any:
        return jax.jit(lambda x: encode(x, format))(w)

    act = Activation(Int(8, token()))
    acts = (SiteActs(t_in=Diagonal(jnp.ones(32)), activation=act),)
    sparse = Sparse(jnp.ones(2), jnp.arange(2), jnp.arange(2))
    more = {"left": jnp.ones((32, 3)), "right": jnp.ones((3, 8)), "sparse": sparse}
    asymmetric = coded(Int(3, group(16), symmetric=False))
    double = coded(Codebook("nf4", group(8), double_quant=256))
    levels, fp4 = coded(Codebook(None, group(16), bits=2)), coded(NVFP4())
    return {
        "a": QTensor.of(asymmetric, layout, jnp.float32, acts, **more),
        "b": QTensor.of((double, levels), layout, jnp.float32, bias=jnp.ones(8)),
        "c": QTensor.of(fp4, layout, jnp.bfloat16),
        "d": jnp.ones(3),
    }


def test_values_of_a_forged_tree_are_checked(tmp_path: Path):
    """Every value replaced by others: refused in a sentence, or still weights."""
    folder = save(tmp_path / "m", rich())
    body = read_manifest(folder)
    leaves = {name: np.zeros(s, d) for name, (d, s) in body["arrays"].items()}
    whole = jax.eval_shape(dequantize, decode(body["tree"], leaves.__getitem__))
    wrong, refused = [], 0

    def leaf(name: Any) -> Any:
        if not isinstance(name, str) or name not in leaves:
            raise ValueError("no such array")
        return leaves[name]

    nodes = [
        (n, node, path) for n, node in body["tree"]["dict"] for path in places(node)
    ]
    for name, node, path in nodes:
        for value in (None, [], "nk", -1, 3, True, {"array": "d"}):
            try:
                found = decode(changed(node, path, value), leaf)
            except ValueError as error:
                refused += 1
                if "\n" in str(error):
                    wrong.append((path, value, error))
                continue
            try:
                made = jax.eval_shape(dequantize, found).shape
            except Exception as error:
                wrong.append((path, value, f"{type(error).__name__}: {error}"[:200]))
                continue
            if is_quantized(found) and made != whole[name].shape:
                wrong.append((path, value, f"{name} {made}"))
    assert wrong == []
    assert refused > 500


def test_forged_axes_and_absent_values_are_named(tmp_path: Path):
    save(tmp_path / "m", {"w": quantized()})
    folder, tree = tmp_path / "m", read_manifest(tmp_path / "m")["tree"]
    leaf = ("dict", 0, 1, "fields")
    part = (*leaf, "parts", "tuple", 0, "fields")
    for path, value, message in (
        ((*leaf, "layout", "fields", "roles"), "nk", r"Coded whose shape is \(32, 8\)"),
        ((*leaf, "dtype"), None, "QTensor whose dtype is None"),
        ((*leaf, "dtype"), {"dtype": "int8"}, "QTensor whose dtype is"),
        ((*part, "scale"), None, "Coded whose scale is None"),
        ((*part, "codes"), {"array": "w/parts/0/scale"}, "Coded whose codes is an arr"),
    ):
        rewrite(folder, tree=changed(tree, path, value))
        for read in (restore, holds_quantized):
            with pytest.raises(ValueError, match=message):
                read(folder)


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
