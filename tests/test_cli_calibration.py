"""The command line where calibration data is needed."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
from matplotlib.image import imread
from safetensors.numpy import load_file

import qjax
from qjax import cuts, results
from qjax.catalogue import BLOCKWISE, CALIBRATED, COMPARED, named
from qjax.cli import main
from qjax.commands.calibration import CalibrationText
from qjax.commands.inputs import Model, open_model
from qjax.commands.quantize import Quantize
from qjax.data import Text
from qjax.recipes import steps_of

# With torch at hand transformers imports it, and hqq, for any tokenizer.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")


def run(capfd, *arguments):
    code = main([str(a) for a in arguments])
    captured = capfd.readouterr()
    return code, captured.out, captured.err


def test_compare_calibrates_with_tokens_that_it_does_not_evaluate(
    folder, text, tmp_path, capfd
):
    arguments = ["compare", "--model", folder, "--out", tmp_path, "--text", text]
    arguments += ["--window", "32", "--tokens", "512", "--batch", "4"]
    arguments += ["--recipes", "gptq-int2-g64", "rtn-int2-g64"]
    code, _, err = run(capfd, *arguments, "--calibration.length", "32")
    assert code == 0, err
    rows = results.read(tmp_path / "compare.jsonl")
    # 700 tokens, of which 512 are evaluated: five windows of 32 are left.
    used = rows[1].context["calibration"]
    assert (used["name"], used["rows"]) == ("pydoc", 128)
    arguments += ["--calibration.text", text]
    code, _, err = run(capfd, *arguments, "--calibration.length", "32")
    used = results.read(tmp_path / "compare.jsonl")[1].context["calibration"]
    assert (used["name"], used["rows"], used["length"]) == (text.name, 5, 32)
    arguments[arguments.index("--tokens") + 1] = "690"
    code, _, err = run(capfd, *arguments)
    assert code == 1 and "only 10 tokens of it are left" in err


def test_quantize_calibrates_and_reports(folder, text, tmp_path, capfd):
    made, report = tmp_path / "made", tmp_path / "report.jsonl"
    code, out, err = run(
        capfd, "quantize", folder, made, "--recipe", "gptq", "--scheme", "W8A8",
        "--calibration.text", text, "--calibration.length", "32", "--kv-cache", "fp8",
        "--calibration.samples", "8", "--calibration.report", report,
    )  # fmt: skip
    assert code == 0, err
    assert "GPTQ" in out and "bits per quantized weight" in out
    sites = [json.loads(line) for line in report.read_text().splitlines()]
    assert any(site.get("samples") == 8 * 32 for site in sites)
    assert imread(report.with_suffix(".png")).shape[0] > 300
    code, _, err = run(capfd, "eval", made, "--text", text, "--window", "32")
    assert code == 0, err
    code, _, err = run(capfd, "export", made, tmp_path / "out")
    assert code == 0, err
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    f, params, _, _ = qjax.load_model(folder, scan_layers=True)
    rows = CalibrationText(text, samples=8, length=32).batches(open_model(str(folder)))
    _, coded = qjax.quantize_cache(f, params, rows.batches)
    for each in ("k_scale", "v_scale"):  # those of the float model
        found = [tensors[f"model.layers.{i}.self_attn.{each}"] for i in range(2)]
        expected = coded["layers"]["attn"][each]
        np.testing.assert_allclose(np.stack(found), expected, rtol=1e-6)


def test_a_report_that_cannot_be_written_is_refused_before_the_work(tmp_path, capfd):
    (tmp_path / "file").write_text("x")
    (tmp_path / "picture.png").mkdir()
    for report in (".", "file/report.jsonl", "picture.jsonl", "report.png"):
        code, _, err = run(
            capfd, "quantize", tmp_path / "no-model", tmp_path / "made",
            "--recipe", "gptq", "--calibration.report", tmp_path / report,
        )  # fmt: skip
        assert code == 1 and "--calibration.report" in err, err


def test_a_transform_with_a_scheme_is_followed_by_rounding():
    steps = Quantize("bundled", Path("out"), "smoothquant", "W8A8").make_recipe()
    assert steps == (qjax.SmoothQuant(), qjax.RTN("W8A8"))


@pytest.mark.parametrize("name", [*CALIBRATED, *COMPARED, *BLOCKWISE])
def test_every_short_name_is_a_recipe_of_quantize(name):
    """With patterns and without; methods that wrap another have that one's."""
    plain = Quantize("bundled", Path("out"), name).make_recipe()
    assert steps_of(plain) == steps_of(named(name).recipe)
    asked = Quantize("bundled", Path("out"), name, targets=("a", "b"), ignore=("c",))
    for step in steps_of(asked.make_recipe()):
        assert (step.targets, step.ignore) == (("a", "b"), ("c",))


class Letters:
    """A token per character, after a start token."""

    def __call__(self, text, add_special_tokens=True, verbose=True):
        start = [0] if add_special_tokens else []
        return {"input_ids": start + [ord(c) for c in text]}


def of_letters(config):
    model = Model("m", print, {}, config, Path(), scan_layers=False)
    model.__dict__["tokenizer"] = Letters()  # in place of the folder's
    return model


def test_texts_are_cut_as_papers_cut_them(tmp_path):
    rows = [{"text": f" document {i}, " + "ab" * (i % 7)} for i in range(40)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = SimpleNamespace(context=16)
    model = of_letters(config)
    options = {"text": file, "samples": 9, "length": 64, "batch": 4, "seed": 5}

    def found(cut):
        batches, mask_fn = CalibrationText(cut=cut, **options).batches(model)
        assert mask_fn is None
        assert all(tokens.shape[0] <= 4 for (tokens,) in batches)
        return np.concatenate([tokens for (tokens,) in batches])

    joined = "\n\n".join(row["text"] for row in rows)
    tokens = np.array([0, *map(ord, joined)])
    np.testing.assert_array_equal(
        found("gptq"), cuts.random_windows(tokens, 9, 16, seed=5)
    )
    order = np.random.default_rng(5).permutation(40)[:9]
    flat = [t for i in order for t in (0, *map(ord, rows[i]["text"].strip()))]
    blocks = np.array(flat[: len(flat) // 16 * 16]).reshape(-1, 16)
    np.testing.assert_array_equal(found("awq"), blocks)


@pytest.mark.parametrize("cut", ["smoothquant", "llmcompressor"])
def test_documents_are_truncated_and_padded(tmp_path, cut):
    """`datasets` shuffles with the same seed in both papers' code."""
    rows = [{"text": f"{i}" + "ab" * (i % 50)} for i in range(60)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = of_letters(SimpleNamespace(context=80, vocabulary=128))
    options = CalibrationText(file, cut=cut, samples=9, batch=4)
    batches, mask_fn = options.batches(model)
    assert mask_fn is not None
    assert {tokens.shape for (tokens,) in batches} <= {(4, 64), (4, 80)}
    found = {tuple(t[m]) for (x,) in batches for t, m in zip(x, mask_fn(x)) if m.any()}
    data = datasets.Dataset.from_list(rows)
    if cut == "llmcompressor":
        data = data.select(range(9))
    texts = data.shuffle(seed=42).select(range(9))["text"]
    assert found == {(0, *map(ord, text))[:80] for text in texts}
    if cut == "llmcompressor":
        file.write_text(file.read_text().replace(json.dumps(rows[20]), "damaged"))
        again, _ = replace(options, streaming=True).batches(model)
        for (x,), (y,) in zip(batches, again, strict=True):
            np.testing.assert_array_equal(x, y)
    else:
        with pytest.raises(ValueError, match="smoothquant chooses among all of them"):
            replace(options, streaming=True).batches(model)


def test_seeds_are_those_of_the_papers_code():
    for cut, seed in (("drawn", 0), ("gptq", 0), ("awq", 42), ("smoothquant", 42)):
        assert CalibrationText(cut=cut).choice_seed == seed
        assert CalibrationText(cut=cut).method_seed == 0
        own = CalibrationText(cut=cut, seed=7)
        assert (own.choice_seed, own.method_seed) == (7, 7)


def test_a_cut_needs_one_text_that_is_not_evaluated(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "x"}')
    model = of_letters(None)
    with pytest.raises(ValueError, match="cut gptq needs one of"):
        CalibrationText(cut="gptq").batches(model)
    with pytest.raises(ValueError, match="is evaluated: give another"):
        text = Text("rows.jsonl", "x")
        CalibrationText(cut="awq", text=file).batches(model, (text, 1))
