"""The command line on a tiny Llama: results, files, sentences and exit codes."""

import contextlib
import io
import math
import shutil

import numpy as np
import pytest
from matplotlib.image import imread

from qjax import results
from qjax.cli import main
from qjax.commands.inputs import TextOptions
from qjax.commands.memory import PeakMemory
from qjax.io.checkpoint import save
from qjax.io.huggingface import load_model

# With torch at hand transformers imports it, and hqq, for any tokenizer.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")


@pytest.fixture
def small(text):
    return _small(text)


def _small(text):
    return ["--text", str(text), "--window", "32", "--tokens", "512", "--batch", "4"]


def run(capfd, *arguments):
    code = main([str(a) for a in arguments])
    captured = capfd.readouterr()
    return code, captured.out, captured.err


def fails(capfd, *arguments):
    """The one sentence on stderr of a command that ends with exit code 1."""
    code, out, err = run(capfd, *arguments)
    assert (code, out) == (1, "")
    assert err.startswith("qjax: error: ")
    assert err.count("\n") == 1
    return err


RECIPES = ("rtn-int8-g64", "rtn-int2-g64", "hqq-int3-g64")


@pytest.fixture(scope="module")
def compared(folder, text, tmp_path_factory):
    """What `qjax compare` printed, and the folder it wrote."""
    out = tmp_path_factory.mktemp("compared") / "new"
    arguments = ["--model", folder, "--out", out, *_small(text), "--recipes", *RECIPES]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(["compare", *map(str, arguments)]) == 0
    return printed.getvalue(), out


def test_compare_writes_a_table_lines_and_a_picture(compared):
    printed, out = compared
    rows = results.read(out / "compare.jsonl")
    labels = ["full precision", "RTN int8 g64", "RTN int2 g64", "HQQ int3 g64"]
    assert [row.label for row in rows] == labels
    assert all(label in printed for label in labels)
    columns = {column.metric for column in results.COLUMNS}
    for row in rows[1:]:
        assert columns <= row.metrics.keys()
        assert all(math.isfinite(row.metrics[name]) for name in columns)
        assert row.context["text"]["sha256"] and row.context["versions"]["jax"]
    full, int8, int2, int3 = (row.metrics for row in rows)
    assert (full["kl"], full["top1_agreement"]) == (0.0, 1.0)
    assert full["bits_per_weight"] == 32
    assert 0 < int8["kl"] < int3["kl"] < int2["kl"]
    assert full["disk_bytes"] > int8["disk_bytes"] > int3["disk_bytes"]
    assert rows[3].config["class"] == "HQQ" and rows[3].series == "HQQ g64"
    assert imread(out / "compare.png").shape[0] > 500


def test_bits_per_weight_count_scales_and_zeros(compared):
    """RTN int2 g64: 2 bits, a float32 scale and a 2-bit zero for each 64 weights."""
    int2 = results.read(compared[1] / "compare.jsonl")[2]
    assert int2.metrics["bits_per_weight"] == pytest.approx(2 + (32 + 2) / 64)


def test_quantized_folders_evaluate_as_the_model_in_memory(
    folder, small, compared, tmp_path, capfd
):
    made, lines = tmp_path / "made", tmp_path / "lines.jsonl"
    code, out, err = run(capfd, "quantize", folder, made, "--recipe", "hqq-int3-g64")
    assert code == 0, err
    assert "q_proj" in out and "bits per quantized weight" in out
    arguments = ["--reference", folder, "--out", lines, *small]
    code, out, err = run(capfd, "eval", made, *arguments)
    assert code == 0, err
    assert "top1 agreement" in out
    saved = results.read(lines)[0].metrics
    here = results.read(compared[1] / "compare.jsonl")[3].metrics
    assert saved["perplexity"] == pytest.approx(here["perplexity"], rel=1e-6)
    assert saved["kl_nats"] == pytest.approx(here["kl"], rel=1e-5)


@pytest.fixture(scope="module")
def saved(folder, tmp_path_factory):
    """What `qjax quantize` wrote, its layers not stacked."""
    out = tmp_path_factory.mktemp("saved") / "new"
    options = ["--targets", "layers/0", "--no-scan-layers"]
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(["quantize", str(folder), str(out), *options]) == 0
    return out


def test_layers_that_were_saved_apart_stay_apart(folder, saved, small, tmp_path, capfd):
    lines = tmp_path / "lines.jsonl"
    arguments = ["--reference", folder, "--out", lines, *small]
    code, _, err = run(capfd, "eval", saved, *arguments)
    assert code == 0, err
    assert 0 < results.read(lines)[0].metrics["kl_nats"] < 1
    code, out, err = run(capfd, "sites", saved)
    assert code == 0, err
    assert "layers/0/attn/q_proj" in out and "layers/1/attn/q_proj" in out


def test_layers_that_were_saved_together_stay_together(folder, tmp_path, capfd):
    """Whether the manifest says so or, saved by hand, only the names."""
    params = load_model(folder, scan_layers=True, lazy=True)[1]
    shell = {"config.json": folder / "config.json"}
    for metadata in ({"scan_layers": True}, {}):
        save(tmp_path / "m", params, files=shell, metadata=metadata, overwrite=True)
        code, out, err = run(capfd, "sites", tmp_path / "m", "--no-scan-layers")
        assert code == 0, err
        assert "layers/attn/q_proj" in out and "layers/0" not in out
    apart = load_model(folder, lazy=True)[1]
    save(tmp_path / "m", apart, files=shell, overwrite=True)
    code, out, err = run(capfd, "sites", tmp_path / "m")
    assert code == 0, err
    assert "layers/1/attn/q_proj" in out


@pytest.mark.parametrize("content", ["{}", "garbage"])
def test_a_damaged_tokenizer(content, folder, tmp_path, small, capfd):
    damaged = tmp_path / "damaged"
    shutil.copytree(folder, damaged)
    (damaged / "tokenizer.json").write_text(content)
    assert "damaged/tokenizer.json is not a" in fails(capfd, "eval", damaged, *small)
    code, _, err = run(capfd, "sites", damaged)
    assert code == 0, err


@pytest.mark.parametrize("name", ["wikitext2", "c4", "ptb"])
def test_named_texts_are_cut_as_the_papers_cut_them(name):
    assert TextOptions(dataset=name).cut(4096) == (0, 2048)
    assert TextOptions(dataset=name).cut(1024) == (0, 1024)
    assert TextOptions(dataset=name).cut(None) == (0, 2048)
    assert TextOptions(dataset=name, tokens=500, window=99).cut(4096) == (500, 99)


def test_other_texts_are_cut_short(text):
    for options in (TextOptions(), TextOptions(text), TextOptions(dataset="pydoc")):
        assert options.cut(4096) == (16384, 512)
        assert options.cut(64) == (16384, 64)


def test_eval_alone(folder, small, capfd):
    code, out, err = run(capfd, "eval", folder, *small, "--stride", "16")
    assert code == 0, err
    assert "sliding" in out and "511" in out


def test_sites_lists_every_weight(folder, capfd):
    code, out, err = run(capfd, "sites", folder)
    assert code == 0, err
    for name in ("q_proj", "down_proj", "embed"):
        assert name in out


def test_choose_answers_by_flags(folder, capfd):
    code, out, err = run(
        capfd, "choose", "--model", folder, "--priority", "speed", "--hardware", "tpu"
    )
    assert code == 0, err
    assert "W8A8" in out and "qjax compare" in out
    code, out, _ = run(capfd, "choose", "--parameters", "8e9", "--memory-gb", "4.5")
    assert code == 0
    assert "hqq-int3-g64" in out and "W4A16" not in out


def test_choose_names_methods_that_are_not_here(capfd):
    code, out, _ = run(capfd, "choose", "--training", "yes")
    assert code == 0
    assert "QAT would suit too, but this version does not have it" in out


def test_choose_asks_on_a_terminal(monkeypatch, capfd):
    answers = iter(["4.5", "n", "n", "gpu", "memory"])
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda *_: next(answers))
    code, out, _ = run(capfd, "choose", "--parameters", "7e9")
    assert code == 0
    assert "memory first, on gpu, 4.5 GB" in out
    assert next(answers, None) is None


def test_choose_runs_what_it_recommends(folder, small, tmp_path, capfd):
    code, out, err = run(
        capfd,
        "choose",
        "--model",
        folder,
        "--priority",
        "simplicity",
        "--run",
        "--out",
        tmp_path,
        *small,
    )
    assert code == 0, err
    labels = [row.label for row in results.read(tmp_path / "compare.jsonl")]
    assert labels[0] == "full precision" and 3 <= len(labels) <= 4
    assert all(label in out for label in labels)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "--model", "FOLDER", "--recipes", "int5"], "'int5' is unknown"),
        (["compare", "--model", "FOLDER", "--text", "no.txt"], "'no.txt' does not"),
        (["eval", "FOLDER", "--window", "65"], "the model reads 64 tokens"),
        (["eval", "FOLDER", "--tokens", "-1"], "--tokens is -1"),
        (["eval", "FOLDER", "--window", "8", "--stride", "8"], "stride is 8"),
        (["eval", "/no/such/folder"], "/no/such/folder"),
        (["sites", "/no/such/folder"], "/no/such/folder"),
        (["quantize", "FOLDER", "OUT", "--scheme", "W9A9"], "unknown scheme 'W9A9'"),
        (["quantize", "FOLDER", "OUT", "--bits", "4"], "--bits is not an opt"),
        (["quantize", "FOLDER", "OUT", "--recipe", "BWQ"], "recipe 'BWQ' is unknown"),
        (["quantize", "FOLDER", "OUT", "--recipe", "AWQ"], "quantizes no weights"),
        (["quantize", "FOLDER", "OUT", "--recipe", "QEP"], "takes another method"),
        (["quantize", "FOLDER", "OUT", "--recipe", "HQQ", "--bits", "9"], "bits"),
        (["quantize", "FOLDER", "OUT", "--targets", "q_prj"], "matches no site"),
        (["quantize", "NONE", "FOLDER"], "was not saved by qjax"),
        (["quantize", "NONE", "FOLDER", "--overwrite"], "was not saved by qjax"),
        (["quantize", "NONE", "SAVED"], "exists already: --overwrite replaces it"),
        (["quantize", "SAVED", "OUT"], "is already quantized: give the model"),
        (["compare", "--model", "SAVED"], "is already quantized: give the model"),
        (["choose", "--memory-gb", "1", "--parameters", "8e9"], "more memory"),
        (["choose", "--parameters", "1e400"], "--parameters is inf: give a number"),
        (["choose", "--parameters", "nan"], "--parameters is nan: give a number"),
        (["choose", "--parameters", "-5"], "--parameters is -5: give a number"),
    ],
)  # fmt: skip
def test_errors_are_one_sentence(arguments, message, folder, saved, tmp_path, capfd):
    places = {"FOLDER": folder, "SAVED": saved, "OUT": tmp_path / "out"}
    sentence = fails(capfd, *(places.get(word, word) for word in arguments))
    assert message in sentence
    assert not (tmp_path / "out").exists()


def test_two_texts_are_refused(text, folder, capfd):
    arguments = ["eval", folder, "--text", text, "--dataset", "c4"]
    assert "--text and --dataset" in fails(capfd, *arguments)


@pytest.mark.parametrize(
    "arguments", [["compare", "--nonsense"], ["quantize"], ["eval"], ["nothing"]]
)
def test_wrong_usage_ends_with_two(arguments, capfd):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ([], ["compare", "quantize", "eval", "sites", "choose"]),
        (["compare"], ["16384", "512", "2048", "tokens", "bundled", "float32"]),
        (["quantize"], ["MODEL", "OUT", "W4A16", "default"]),
        (["choose"], ["GB", "changing-inputs", "--run"]),
    ],
)
def test_help_shows_defaults_and_units(command, words, capfd):
    with pytest.raises(SystemExit) as caught:
        main([*command, "--help"])
    assert caught.value.code == 0
    out = capfd.readouterr().out
    assert all(word in out for word in words)


def test_traceback_on_request(folder):
    with pytest.raises(ValueError, match="the model reads 64"):
        main(["--traceback", "eval", str(folder), "--window", "65"])


def test_peak_memory_sees_what_was_held():
    with PeakMemory() as peak:
        held = np.ones(40_000_000, np.uint8)
    assert held.nbytes * 0.95 < peak.rise < held.nbytes * 1.5
