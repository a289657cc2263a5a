"""Damaged and malicious folders: one sentence, nothing run, nothing half-written."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qjax.cli import main
from qjax.io.huggingface import load_model, load_weights, read_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
UP = "model.layers.1.mlp.up_proj.weight"


class Payload:
    """Unpickling it writes a file."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch '{self.target}'",)


def mark(folder: Path) -> Path:
    """What would be there if code of the folder had run."""
    return folder.parent / "executed"


def pickled(folder: Path, name: str) -> None:
    (folder / WEIGHTS).unlink(missing_ok=True)
    (folder / name).write_bytes(pickle.dumps(Payload(mark(folder))))


def edit(folder: Path, change: Callable[[dict], None]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def listed(folder: Path, file: str) -> None:
    index = {"weight_map": dict.fromkeys(load_file(folder / WEIGHTS), file)}
    (folder / INDEX).write_text(json.dumps(index))


def configured(folder: Path, **fields) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def code(folder: Path) -> None:
    """A module that leaves a mark when it is imported."""
    text = f"import pathlib\npathlib.Path({str(mark(folder))!r}).touch()\n"
    text += "class EvilForCausalLM: pass\nclass EvilTokenizer: pass\n"
    (folder / "modeling_evil.py").write_text(text)


def remote_model(folder: Path, kind: str) -> None:
    code(folder)
    map = {"AutoModelForCausalLM": "modeling_evil.EvilForCausalLM"}
    configured(folder, auto_map=map, model_type=kind, trust_remote_code=True)


def headed(folder: Path, header: bytes) -> None:
    data = len(header).to_bytes(8, "little") + header
    (folder / WEIGHTS).write_bytes(data)


def truncated(folder: Path) -> None:
    file = folder / WEIGHTS
    file.write_bytes(file.read_bytes()[:-8])


def retyped(tensors: dict) -> None:
    tensors[UP] = tensors[UP].astype(np.int32)


def reshaped(tensors: dict) -> None:
    tensors[UP] = np.ascontiguousarray(tensors[UP][:, 1:])


DAMAGE = {
    "truncated": (truncated, "is truncated"),
    "a header of garbage": (lambda f: headed(f, b"garbage"), "corrupted header"),
    "a header without end": (lambda f: headed(f, b"[" * 100_000), "corrupted header"),
    "a header of one number": (lambda f: headed(f, b"9" * 9_999), "corrupted header"),
    "a tensor is missing": (lambda f: edit(f, lambda x: x.pop(UP)), "no tensor .*up_p"),
    "another shape": (lambda f: edit(f, reshaped), r"has shape \[64, 63\]"),
    "another type": (lambda f: edit(f, retyped), "up_proj.weight is int32"),
    "an index to elsewhere": (
        lambda f: listed(f, "../tiny/model.safetensors"),
        "a file outside its folder",
    ),
    "an index to the root": (lambda f: listed(f, "/etc/passwd"), "outside its folder"),
    "an index to nothing": (lambda f: listed(f, ""), "a file outside its folder"),
    "an index to a pickle": (
        lambda f: (listed(f, "x.bin"), pickled(f, "x.bin")),
        "x.bin is a pickle, which runs code when read",
    ),
    "an index without end": (
        lambda f: (f / INDEX).write_text("[" * 100_000),
        "is not valid JSON",
    ),
    "a pickle": (lambda f: pickled(f, "pytorch_model.bin"), "is a pickle, which runs"),
    "a checkpoint": (lambda f: pickled(f, "model.pt"), "model.pt is a pickle"),
    "a pickle by another name": (lambda f: pickled(f, WEIGHTS), "corrupted header"),
    "code for a known type": (lambda f: remote_model(f, "llama"), "auto_map names 'mo"),
    "code for its own type": (lambda f: remote_model(f, "evil"), "model_type is 'evil"),
    "a configuration without end": (
        lambda f: (f / "config.json").write_text('{"a":' * 100_000),
        "is not valid JSON",
    ),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_it_is_refused(folder: Path, tmp_path: Path, capfd, how: str):
    damage, message = DAMAGE[how]
    here = tmp_path / "here"
    shutil.copytree(folder, here / "model")
    damage(here / "model")
    before = sorted(here.rglob("*"))
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        load_weights(here / "model")
    assert "\n" not in str(error.value)
    for command in (["quantize", here / "model", here / "out"], ["export"]):
        if command == ["export"]:
            command = ["export", here / "model", here / "out"]
        assert main([str(word) for word in command]) == 1
        captured = capfd.readouterr()
        assert captured.err.startswith("qjax: error: ")
        assert captured.err.count("\n") == 1
    assert sorted(here.rglob("*")) == before
    assert not mark(here / "model").exists()


def test_a_tokenizer_of_ones_own_is_not_run(folder: Path, tmp_path: Path, monkeypatch):
    def asked(*_):
        raise AssertionError("it asked whether to run the code")

    monkeypatch.setattr("builtins.input", asked)
    copy = shutil.copytree(folder, tmp_path / "model")
    code(copy)
    said = json.loads((copy / "tokenizer_config.json").read_text())
    said["tokenizer_class"] = "EvilTokenizer"
    said["auto_map"] = {"AutoTokenizer": ["modeling_evil.EvilTokenizer", None]}
    (copy / "tokenizer_config.json").write_text(json.dumps(said))
    with pytest.raises(ValueError, match="is not a tokenizer that can be") as error:
        read_tokenizer(copy)
    assert "\n" not in str(error.value)
    assert not mark(copy).exists()


def test_a_class_of_the_models_own_type_is_read_as_any(folder: Path, tmp_path: Path):
    """As Phi-3's, which names the files that it had before it was in transformers."""
    copy = shutil.copytree(folder, tmp_path / "model")
    code(copy)
    configured(
        copy, auto_map={"AutoModelForCausalLM": "modeling_evil.LlamaForCausalLM"}
    )
    _, params, tokenizer, _ = load_model(copy)
    assert tokenizer is not None and params
    assert not mark(copy).exists()


def test_the_index_says_which_file_a_tensor_is_of(folder: Path, tmp_path: Path):
    """A second file that holds it too, later in order, changes nothing."""
    copy = shutil.copytree(folder, tmp_path / "model")
    tensors = load_file(copy / WEIGHTS)
    (copy / WEIGHTS).unlink()
    half = len(tensors) // 2
    first = dict(list(tensors.items())[:half])
    second = dict(list(tensors.items())[half:])
    save_file(first, copy / "a.safetensors")
    save_file(
        second | {name: x * 0 for name, x in first.items()}, copy / "b.safetensors"
    )
    index = dict.fromkeys(first, "a.safetensors") | dict.fromkeys(
        second, "b.safetensors"
    )
    (copy / INDEX).write_text(json.dumps({"weight_map": index}))
    _, found, _ = load_weights(copy)
    _, expected, _ = load_weights(folder)
    kernel = expected["layers"]["0"]["attn"]["q_proj"]["kernel"]
    np.testing.assert_array_equal(
        found["layers"]["0"]["attn"]["q_proj"]["kernel"], kernel
    )
    np.testing.assert_array_equal(
        found["layers"]["1"]["mlp"]["up_proj"]["kernel"],
        expected["layers"]["1"]["mlp"]["up_proj"]["kernel"],
    )


def test_code_of_the_model_is_not_copied(folder: Path, tmp_path: Path, capfd):
    copy = shutil.copytree(folder, tmp_path / "model")
    (copy / "tokenization_evil.py").write_text("x = 1\n")
    (copy / "tokens.bin").write_bytes(b"x")
    (copy / "chat_template.jinja").write_text("{{ messages }}")
    made, out = tmp_path / "made", tmp_path / "out"
    options = ["--scheme", "W8A8"]
    assert main(["quantize", str(copy), str(made), *options]) == 0, capfd.readouterr()
    assert main(["export", str(made), str(out)]) == 0, capfd.readouterr().err
    for where in (made, out):
        names = {path.name for path in where.iterdir()}
        assert "tokenizer.json" in names and "chat_template.jinja" in names
        assert not names & {"tokenization_evil.py", "tokens.bin"}
