"""The folder that an export writes, whatever the format."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from flax import nnx
from safetensors import safe_open

from qjax.cli import main
from qjax.commands.inputs import open_model
from qjax.commands.quantize import shell_files
from qjax.core.coded import encode
from qjax.core.formats import Int, group
from qjax.core.layout import Layout
from qjax.core.qtensor import QTensor, Stacked
from qjax.io.bits import pack_rows, unpack_rows
from qjax.io.checkpoint import save
from qjax.io.export import export
from qjax.io.huggingface import load_weights
from qjax.io.modelcard import model_card
from qjax.methods import RTN
from qjax.models import gpt2, qwen3_moe
from qjax.models.fields import Fields
from qjax.models.functional import functional
from qjax.results import Record, append

W4 = Int(4, group(32))


@pytest.mark.parametrize("bits", range(1, 9))
def test_rows_of_codes_come_back(bits: int):
    codes = np.random.default_rng(0).integers(0, 2**bits, (3, 37)).astype(np.uint8)
    words = pack_rows(codes, bits)
    assert words.shape == (3, -(-37 * bits // 32))
    np.testing.assert_array_equal(unpack_rows(words, bits, 37), codes)


def test_the_folder_is_whole(small: Any, tmp_path: Path):
    out = export(
        tmp_path / "new" / "out",
        small.quantized(W4),
        model=small.folder,
        recipe=RTN("W4A16"),
        quality={"perplexity": 12.34567},
        base="someone/model",
        shard_bytes=40_000,
    )
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    count = len(files)
    assert count > 2
    assert files[0] == f"model-00001-of-{count:05}.safetensors"
    held: dict[str, str] = {}
    for file in files:
        with safe_open(out / file, "numpy") as opened:
            assert opened.metadata() == {"format": "pt"}
            held |= dict.fromkeys(opened.keys(), file)
        assert (out / file).stat().st_size < 50_000
    assert held == index["weight_map"]
    others = {"config.json", "generation_config.json", "chat_template.jinja"}
    names = {path.name for path in out.iterdir()}
    assert names == {*files, *others, "README.md", "model.safetensors.index.json"}
    card = (out / "README.md").read_text()
    assert card.startswith("---\nbase_model: someone/model\n")
    assert "| 14 | int4 g32 |" in card
    assert '"class": "RTN"' in card
    assert "| perplexity | 12.35 |" in card
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_stacked_and_unrolled_models_give_the_same_files(small: Any, tmp_path: Path):
    qparams = small.quantized(W4)
    out = export(tmp_path / "a", qparams, model=small.folder)
    _, unrolled, _ = load_weights(out)
    again = export(tmp_path / "b", unrolled, model=out)
    for name in ("model.safetensors", "config.json"):
        assert (out / name).read_bytes() == (again / name).read_bytes()


def test_runs_of_layers_with_formats_of_their_own(small: Any, tmp_path: Path):
    def runs(a: Any, b: Any) -> Any:
        if not isinstance(a, QTensor):
            return a
        return Stacked((a[:1], b[1:]), ((0, 1), (1, 2)))

    four, eight = small.quantized(W4), small.quantized(Int(8, group(32)))
    is_leaf = lambda x: isinstance(x, QTensor)
    qparams = jax.tree.map(runs, four, eight, is_leaf=is_leaf)
    out = export(tmp_path / "out", qparams, model=small.folder)
    _, back, _ = load_weights(out)
    for layer, each in (("0", four), ("1", eight)):
        found = back["layers"][layer]["mlp"]["up_proj"]["kernel"]
        wanted = each["layers"]["mlp"]["up_proj"]["kernel"][int(layer)]
        jax.tree.map(np.testing.assert_array_equal, found, wanted)


_encode = jax.jit(lambda w: encode(w, W4))


def quantized(params: Any, chosen: Any) -> Any:
    """The leaves whose path ends as `chosen` says, in 4 bits."""

    def leaf(path: Any, w: Any) -> Any:
        name = "/".join(key.key for key in path)
        if not name.endswith(chosen):
            return w
        roles = "b" * (w.ndim - 2) + "kn"
        sizes = (*(0,) * (w.ndim - 2), *w.shape[-2:])
        return QTensor.of(_encode(w), Layout(roles, sizes), w.dtype)

    return jax.tree_util.tree_map_with_path(leaf, params)


def random(module: Any, fields: dict[str, Any], folder: Path) -> Any:
    """A random model's parameters, and a folder with its configuration."""
    config = module.from_fields(Fields(fields))
    (folder / "config.json").write_text(json.dumps(fields))
    make = lambda: module.build(config, rngs=nnx.Rngs(0))
    shapes = functional(nnx.eval_shape(make))[1]
    rng = np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape, np.float32))
    return jax.tree.map(draw, shapes)


EXPERTS = {
    "model_type": "qwen3_moe",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "tie_word_embeddings": True,
    "max_position_embeddings": 32,
}


@pytest.mark.filterwarnings("ignore:.*gate_proj and .*up_proj are stored in different")
def test_experts_are_written_one_by_one(tmp_path: Path):
    params = random(qwen3_moe, EXPERTS, tmp_path)
    qparams = quantized(params, ("up_proj/kernel", "o_proj/kernel"))
    out = export(tmp_path / "out", qparams, model=tmp_path)
    with safe_open(out / "model.safetensors", "numpy") as file:
        name = "model.layers.0.mlp.experts.2.up_proj.weight_packed"
        assert file.get_slice(name).get_shape() == [32, 4]
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert "lm_head" in config["ignore"]
    assert "model.layers.0.mlp.gate" in config["ignore"]
    _, back, _ = load_weights(out)
    assert jax.tree.structure(back) == jax.tree.structure(qparams)
    jax.tree.map(np.testing.assert_array_equal, back, qparams)


def test_what_is_no_linear_in_torch_is_refused(small: Any, tmp_path: Path):
    fields = {"model_type": "gpt2", "vocab_size": 64, "n_embd": 32, "n_layer": 1}
    params = random(gpt2, fields | {"n_head": 2, "n_positions": 32}, tmp_path)
    kernels = quantized(params, "mlp/up_proj/kernel")
    with pytest.raises(ValueError, match=r"^layers/0/mlp/up_proj/kernel .* is none in"):
        export(tmp_path / "out", kernels, model=tmp_path)
    table = quantized(small.params, "embed/embedding")
    with pytest.raises(ValueError, match=r"^embed/embedding is quantized, but gptq"):
        export(tmp_path / "out", table, model=small.folder, format="gptq")
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_wrong_arguments(small: Any, tmp_path: Path):
    qparams = small.quantized(W4)
    with pytest.raises(ValueError, match="format is 'zip'; it must be one of"):
        export(tmp_path / "out", qparams, model=small.folder, format="zip")
    with pytest.raises(ValueError, match="no leaf is quantized"):
        export(tmp_path / "out", small.params, model=small.folder)
    with pytest.raises(ValueError, match=r"^other has no name in a Hugging Face"):
        more = {**qparams, "other": jnp.ones(3)}
        export(tmp_path / "out", more, model=small.folder)
    with pytest.raises(ValueError, match="shard_bytes is 0"):
        export(tmp_path / "out", qparams, model=small.folder, shard_bytes=0)
    with pytest.raises(FileExistsError, match="exists already"):
        export(tmp_path, qparams, model=small.folder)
    with pytest.raises(FileNotFoundError, match="is no folder, and no model"):
        export(tmp_path / "out", qparams, model=tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []


def test_the_command(small: Any, tmp_path: Path, capfd: Any):
    files = {"config.json": small.folder / "config.json"}
    metadata = {"model": "someone/model", "scan_layers": True}
    folder = save(
        tmp_path / "ours",
        small.quantized(W4),
        recipe=RTN("W4A16"),
        metadata=metadata,
        files=files,
    )
    command = ["export", str(folder), str(tmp_path / "out"), "--format", "gptq"]
    assert main(command) == 0
    assert "(gptq)" in capfd.readouterr().out
    assert "base_model: someone/model" in (tmp_path / "out/README.md").read_text()
    _, back, _ = load_weights(tmp_path / "out", scan_layers=True)
    jax.tree.map(np.testing.assert_array_equal, back, small.quantized(W4))
    assert main(command) == 1
    assert "exists already: give another folder" in capfd.readouterr().err
    # What another library quantized can be exported again.
    measured = tmp_path / "measured.jsonl"
    context = {"text": {"name": "pydoc", "sha256": "0" * 64}}
    metrics = {"perplexity": 12.34, "kl_nats": 0.01, "tokens_per_second": 5.0}
    append(measured, Record("other", {}, {"perplexity": 99.0}, context))
    command = ["export", str(tmp_path / "out"), str(tmp_path / "ct")]
    command += ["--results", str(measured)]
    assert main(command) == 1
    assert "holds no results of out, but of other" in capfd.readouterr().err
    append(measured, Record("out", {}, metrics, context))
    task = Record("out, piqa", {}, {"acc": 0.5}, {"task": "piqa"})
    append(measured, task)
    assert main(command) == 0
    card = (tmp_path / "ct/README.md").read_text()
    assert "| perplexity, pydoc | 12.34 |\n| kl nats, pydoc | 0.01 |\n" in card
    assert "| acc, piqa | 0.5 |\n" in card
    assert "tokens per second" not in card and "99" not in card
    append(measured, Record("out", {}, {"perplexity": 11.0}, context))
    again = [*command[:2], str(tmp_path / "again"), *command[3:]]
    assert main(again) == 1
    assert "holds perplexity, pydoc of out twice" in capfd.readouterr().err
    for size in ("inf", "nan", "0", "-1"):
        assert main([*again[:3], "--shard-gb", size]) == 1
        assert f"--shard-gb is {float(size)}: give" in capfd.readouterr().err
    _, back, _ = load_weights(tmp_path / "ct", scan_layers=True)
    jax.tree.map(np.testing.assert_array_equal, back, small.quantized(W4))
    with pytest.raises(ValueError, match="is already quantized"):
        open_model(str(tmp_path / "ct"), in_float=True)


def _without(tree: Any, *path: str) -> Any:
    """The tree without what is under a path."""
    key, *rest = path
    kept = {k: v for k, v in tree.items() if k != key}
    return kept | {key: _without(tree[key], *rest)} if rest else kept


@pytest.mark.parametrize("scan_layers", [True, False])
def test_leaves_that_are_not_all_of_the_models(
    small: Any, tmp_path: Path, scan_layers: bool
):
    qparams = small.quantized(W4)
    if not scan_layers:
        whole = export(tmp_path / "whole", qparams, model=small.folder)
        qparams = load_weights(whole)[1]
    layer = () if scan_layers else ("1",)

    def refused(params: Any, message: str, model: Path = small.folder) -> None:
        with pytest.raises(ValueError, match=f"^{message}"):
            export(tmp_path / "out", params, model=model)
        assert not (tmp_path / "out").exists()

    refused(_without(qparams, "embed"), r"the parameters have no leaf embed/embedding")
    for path in ((*layer, "mlp", "up_proj", "kernel"), (*layer, "attn"), layer):
        if path:
            refused(
                _without(qparams, "layers", *path), "the parameters have no leaf la"
            )
    norm = {**qparams, "norm": {"scale": jnp.ones(63)}}
    refused(
        norm, r"norm/scale has shape \[63\], the model's config.json expects \[64\]"
    )
    config = json.loads((small.folder / "config.json").read_text())
    sizes = {
        "num_hidden_layers": (1, 3),
        "intermediate_size": (64,),
        "vocab_size": (63,),
    }
    other = tmp_path / "other"
    other.mkdir()
    for name, value in ((n, v) for n, values in sizes.items() for v in values):
        (other / "config.json").write_text(json.dumps(config | {name: value}))
        message = r"(layers|embed)/.* has shape .*, the model's config.json expects "
        if name == "num_hidden_layers" and not scan_layers:
            message = "(layers/1/.* has no name|the parameters have no leaf layers/2/)"
        refused(qparams, message, other)


def test_names_end_no_line_of_the_model_card():
    """What a manifest says of its model is somebody else's text."""
    evil = "a/b\nlicense: evil\n---\n# Title | x"
    card = model_card(evil, evil, "gptq", 4.0, {evil: 1}, quality={evil: evil})
    header, _, rest = card.removeprefix("---\n").partition("\n---\n")
    assert yaml.safe_load(header) == {
        "library_name": "transformers",
        "tags": ["gptq", "qjax"],
    }
    assert not any(line.startswith(("license", "---")) for line in rest.splitlines())
    assert rest.count("\n# ") + rest.startswith("# ") == 1
    card = model_card("x", "1/2e3", "gptq", 4.0, {})
    header = card.removeprefix("---\n").partition("\n---\n")[0]
    assert yaml.safe_load(header)["base_model"] == "1/2e3"


def test_links_out_of_the_models_folder_are_not_followed(small: Any, tmp_path: Path):
    secret = tmp_path / "secret"
    secret.write_text("secret")
    repository = tmp_path / "models--a--b"
    folder, blobs = repository / "snapshots" / "0", repository / "blobs"
    folder.mkdir(parents=True)
    blobs.mkdir()
    for file in small.folder.iterdir():  # as the hub's cache keeps files
        (blobs / file.name).write_bytes(file.read_bytes())
        (folder / file.name).symlink_to(Path("../../blobs") / file.name)
    export(tmp_path / "out", small.quantized(W4), model=folder)
    assert "chat_template.jinja" in shell_files(folder)
    (folder / "tokenizer.json").symlink_to(secret)
    for each in (folder, shutil.copytree(folder, tmp_path / "plain", symlinks=True)):
        with pytest.raises(ValueError, match="is a link to a file outside its folder"):
            shell_files(each)
    with pytest.raises(ValueError, match="is a link to a file outside its folder"):
        export(tmp_path / "other", small.quantized(W4), model=folder)
    assert not (tmp_path / "other").exists()
