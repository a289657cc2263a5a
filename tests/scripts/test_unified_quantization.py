"""The five-method script on the bundled model, with very little calibration data."""

import json
import re
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

sys.path.append(str(Path(__file__).parents[2] / "scripts"))
import unified_quantization

import qjax
from qjax.core.qtensor import is_quantized
from qjax.io.checkpoint import read_manifest, restore
from qjax.io.huggingface import load_weights
from qjax.trace.paths import flatten_with_paths

# torch's own, when transformers first imports it for the tokenizer.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
MODEL = Path(qjax.__file__).parent / "models/tiny_llama"
TEXT = "A number is a value of a numeric type; see the section about numbers.\n" * 40
# One point of the program each: a solver takes seconds to compile.
DOWN, ATTENTION = "layers/0/mlp/down_proj", "layers/0/attn/[qkv]_proj"


@pytest.fixture
def run(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)

    def call(method, *more):
        out = tmp_path / method
        small = ("--num-calibration-samples", "3", "--max-seq-length", "32")
        given = ("--model", "bundled", "--method", method, "--output", str(out))
        files = ("--text", str(text), "--batch-size", "3")
        return unified_quantization.main([*given, *small, *files, *more]), out

    return call


def rows(out):
    return [json.loads(x) for x in (out / "report.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("method", "targets", "more", "format", "steps"),
    [
        ("gptq", DOWN, ("--dampening-frac", "0.05"), "int4 g128", ["GPTQ"]),
        ("awq", DOWN, ("--duo-scaling", "both"), "int4 g128 asym", ["AWQ", "RTN"]),
        (
            "autoround",
            DOWN,
            ("--iters", "3"),
            "int4 g128 signed",
            ["AutoRound"],
        ),
        (
            "smoothquant",
            ATTENTION,
            ("--smoothing-strength", "0.6"),
            "int8 channel",
            ["SmoothQuant", "GPTQ"],
        ),
        ("simple_ptq", "layers/0", (), "int8 channel", ["SimplePTQ"]),
    ],
)
def test_method_from_the_command_line(run, method, targets, more, format, steps):
    code, out = run(method, "--targets", targets, *more)
    assert code == 0
    leaves = dict(flatten_with_paths(restore(out)))
    coded = {path for path, leaf in leaves.items() if is_quantized(leaf)}
    assert coded and all(path.startswith("layers/0/") for path in coded)
    assert {r["format"] for r in rows(out) if r["kind"] == "leaf"} == {format}
    recipe = read_manifest(out)["recipe"]
    assert [step["class"] for step in recipe] == steps
    said = recipe[0]
    if method == "gptq":
        assert said["damping"] == 0.05
        assert_predicts_alike(out)
    if method == "autoround":
        assert said["iters"] == 3
    if method == "awq":
        assert said["duo_scaling"] == "both"
        assert any(r["kind"] == "transform" for r in rows(out))
    if method == "smoothquant":
        assert said["smoothing_strength"] == 0.6
    assert (out / "tokenizer.json").is_file() and (out / "config.json").is_file()


def assert_predicts_alike(out):
    f, params, _ = load_weights(MODEL)
    tokens = jnp.arange(16)[None]
    exact = f(params, tokens)
    off = qjax.apply(f)(restore(out), tokens) - exact
    assert jnp.sqrt(jnp.mean(off**2) / jnp.mean(exact**2)) < 0.2


@pytest.mark.parametrize(
    ("method", "more", "said"),
    [
        (
            "gptq",
            ("--duo-scaling", "both"),
            "--duo-scaling is an option of awq, not",
        ),
        ("gptq", ("--scheme", "W4A61"), "unknown scheme 'W4A61'"),
        ("gptq", ("--text", "absent.txt"), "'absent.txt' does not exist"),
        ("awq", ("--num-calibration-samples", "0"), "samples is 0 .* at least 1"),
        ("simple_ptq", ("--targets", "layer/0"), "matches no site"),
    ],
)
def test_errors_are_one_sentence(run, capsys, method, more, said):
    code, out = run(method, *more)
    error = capsys.readouterr().err
    assert code == 1 and not out.exists()
    assert error.startswith("error: ") and error.count("\n") == 1
    assert re.search(said, error)
