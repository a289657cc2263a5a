"""`qjax plan`: refusals anywhere, and a plan where the compiler of TPUs is."""

import json
import logging
import sys
from io import StringIO
from pathlib import Path

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from matplotlib.image import imread

from qjax import results
from qjax.cli import main
from qjax.commands import plan as command
from qjax.plan import layouts
from qjax.plan.compilers import _last_line
from qjax.plan.machines import machine
from qjax.plan.picture import plan_plot
from qjax.plan.report import merged, refusals, summary, table, uncounted, verdict

FIELDS = {
    "model_type": "llama",
    "vocab_size": 2048,
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
}
TPU = Path(sys.prefix) / "libtpu" / "libtpu"
with_compiler = pytest.mark.skipif(not TPU.is_dir(), reason="no compiler of TPUs")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "small"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(FIELDS))
    return folder


def fails(capfd, *arguments):
    code = main(["plan", *map(str, arguments)])
    out, err = capfd.readouterr()
    assert (code, out, err.count("\n")) == (1, "", 1)
    return err


def test_one_sentence_for_what_is_not_known(model, capfd, monkeypatch, tmp_path):
    assert "valid are names such as" in fails(capfd, model, "--topology", "v9:2x2")
    assert "valid are bf16" in fails(capfd, model, "--scheme", "W4A17")
    assert "--batch is 0" in fails(capfd, model, "--batch", 0)
    assert "--prompt is 64" in fails(capfd, model, "--context", 32, "--prompt", 64)
    assert "known by name" in fails(capfd, "no/such-model")
    monkeypatch.setattr("sys.prefix", str(tmp_path))
    assert "pip install" in fails(capfd, model)


def test_a_value_is_given_once(model, capfd):
    for option, value in (("steps", "decode"), ("batch", 8), ("topology", "v5e:2x4")):
        said = fails(capfd, model, f"--{option}", value, value)
        assert said == (
            f"qjax: error: --{option} has {value} twice: give each value once\n"
        )


def test_a_name_that_leads_nowhere_is_one_sentence(capfd, monkeypatch):
    """The hub's client warns of every try."""
    log = logging.getLogger("huggingface_hub.utils._http")
    said = logging.StreamHandler()

    def hf_hub_download(model, file):
        log.warning("Retrying in 1s")
        raise LocalEntryNotFoundError("nothing there")

    monkeypatch.setattr(layouts, "hf_hub_download", hf_hub_download)
    log.addHandler(said)
    try:
        assert "Llama-4-9B is no folder" in fails(capfd, "Llama-4-9B")
        log.warning("heard again")
    finally:
        log.removeHandler(said)
    assert "heard again" in capfd.readouterr().err


def test_one_thing_by_two_names_is_given_twice(model, capfd):
    said = fails(capfd, model, "--scheme", "W4A16", "w4a16")
    assert "--scheme has W4A16 twice" in said
    said = fails(capfd, model, "--topology", "v7x:2x2x1", "tpu7x:2x2x1")
    assert "--topology has v7x:2x2x1 twice" in said


GPT2 = {"model_type": "gpt2", "vocab_size": 512, "n_embd": 64, "n_layer": 1}
GPT2 |= {"n_head": 2, "n_positions": 64}


def test_positions_that_a_model_does_not_have(model, tmp_path, capfd, monkeypatch):
    """Learned ones end; of rotations it is said that nobody knows."""
    rotates, learns = tmp_path / "rotates", tmp_path / "learns"
    fields = {rotates: FIELDS | {"max_position_embeddings": 64}, learns: GPT2}
    for folder, own in fields.items():
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(own))
    options = ["--context", "128", "--prompt", "8", "--out", tmp_path / "out"]
    said = fails(capfd, learns, *options)
    assert "--context is 128, but learns has 64 positions\n" in said
    planned(monkeypatch, tmp_path)
    assert main(["plan", *map(str, (rotates, *options))]) == 0
    assert "rotates has 64 positions by its" in capfd.readouterr().out
    assert main(["plan", *map(str, (model, *options))]) == 0
    assert "positions by its" not in capfd.readouterr().out


def planned(monkeypatch, folder, rows=None):
    """Programs that no compiler has seen."""

    def run_plans(layout, place, plans, compiler):
        for plan in plans:
            yield program(plan["step"])

    monkeypatch.setattr(command, "run_plans", rows or run_plans)
    monkeypatch.setattr(command, "find_compiler", lambda platform, folders: folder)


def test_a_folder_that_cannot_be_written_is_said_before_compiling(
    model, tmp_path, capfd, monkeypatch
):
    def run_plans(*_):
        raise AssertionError("compiled")

    planned(monkeypatch, tmp_path, run_plans)
    (tmp_path / "file").write_text("")
    assert "file" in fails(capfd, model, "--out", tmp_path / "file" / "below")


def test_lines_are_written_all_or_none(model, tmp_path, capfd, monkeypatch):
    """What an interrupted run left behind is not what the next one shows."""
    planned(monkeypatch, tmp_path)
    (tmp_path / "small-v5e-2x4.part").write_text("half a li")
    (tmp_path / "small-v5e-2x4.jsonl").write_text("old")
    arguments = ["plan", str(model), "--out", str(tmp_path), "--scheme", "W4A16"]

    def interrupted(path, record):
        path.write_text("ha")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(command, "append", interrupted)
        assert main(arguments) == 130
    assert (tmp_path / "small-v5e-2x4.jsonl").read_text() == "old"
    assert main(arguments) == 0
    assert len(results.read(tmp_path / "small-v5e-2x4.jsonl")) == 1
    assert not (tmp_path / "small-v5e-2x4.part").exists()


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("a\nF1129 07:20 x.cc:7] Check failed: size >= 0\nE1129 signal 6\n", "F1129"),
        ("a\nb\n", "ended: b"),
        ("", "said nothing"),
    ],
)
def test_what_killed_the_compiler_is_quoted(said: str, shown: str):
    assert shown in _last_line(StringIO(said))


GIVEN = {"scheme": "W4A16", "batch": 16, "context": 4096, "prompt": 1024}


def program(step: str, **more):
    found = {"fits": True, "needed_bytes": 2**31, "available_bytes": 2**34}
    found |= {"weights_bytes": 2**30, "cache_bytes": 2**29, "temporaries_bytes": 0}
    found |= {"bytes_per_token": 1e6, "operations_per_token": 2e9, "refusal": ""}
    found |= {"tokens": 16, "seconds": 2.0, "cpu_seconds": 1.0, "peak_rss_bytes": 5e8}
    found |= {"limit_seconds": 0.002, "compiled_seconds": 0.003}
    found |= {"matrix_seconds": 0.001, "memory_seconds": 0.002}
    found |= {"sent_bytes_per_device": 1e6}
    return {**GIVEN, "step": step, **found, **more}


def test_programs_of_a_scheme_make_one_record():
    both = {"decode": program("decode"), "prefill": program("prefill")}
    found = summary(both)
    assert (found["fits"], found["memory_GiB"], found["weights_GiB"]) == ("yes", 2, 1)
    assert found["tokens_per_s"] == 16 / 0.002
    assert (found["planning_seconds"], found["planning_cpu_seconds"]) == (4, 2)
    both["prefill"] = program("prefill", fits=False, refusal="Ran out of memory")
    record = merged("W4A16", both)
    assert record.metrics["fits"] == "no"
    assert refusals([record]) == ["W4A16, prefill: does not fit: Ran out of memory"]
    both["decode"] = {**GIVEN, "step": "decode", "error": "INTERNAL: lost"}
    assert verdict(both) == "failed"
    assert "failed: INTERNAL: lost" in refusals([merged("W4A16", both)])[0]
    drawn = table([record], machine("v5e:2x4"), "small")
    assert drawn.row_count == 1 and "Not in them: vector units" in drawn.caption
    assert uncounted([record]) == []
    both["decode"] = program("decode", uncounted={"while": 2})
    assert uncounted([merged("W4A16", both)]) == [
        "W4A16, decode: counted once or not: while (2)"
    ]


@pytest.mark.parametrize("lost", [("decode", "prefill"), ("prefill",)])
def test_what_does_not_compile_is_an_error(lost, model, tmp_path, capfd, monkeypatch):
    """Exit code 1 and one sentence; what did compile is shown, and nothing is not."""

    def run_plans(layout, place, plans, compiler):
        for plan in plans:
            failed = {**plan, "error": "INTERNAL: lost"}
            yield failed if plan["step"] in lost else program(plan["step"])

    monkeypatch.setattr(command, "run_plans", run_plans)
    monkeypatch.setattr(command, "find_compiler", lambda platform, folders: tmp_path)
    arguments = ["--scheme", "W4A16", "--out", str(tmp_path / "out")]
    assert main(["plan", str(model), *arguments]) == 1
    out, err = capfd.readouterr()
    more = "; 1 more failed" if lost[1:] else ""
    assert err.splitlines()[-1] == (
        f"qjax: error: v5e:2x4, W4A16, {lost[0]}: failed: INTERNAL: lost{more}"
    )
    written = any((tmp_path / "out").iterdir())
    assert ("W4A16" in out) == written == (len(lost) == 1)


def test_loads_make_a_picture_of_memory_and_roofline(tmp_path):
    """A row of two for each of batch and context; refused programs have no limit."""
    refused = {"fits": False, "refusal": "Ran out of memory"}
    loads = {(1, 2048): {}, (8, 2048): {"memory_seconds": 0.0001}, (1, 4096): refused}
    records = [
        merged("W4A16", {"decode": program("decode", batch=b, context=c, **more)})
        for (b, c), more in loads.items()
    ]
    for count, name in ((1, "one.png"), (3, "three.png")):
        plan_plot(tmp_path / name, records[:count], machine("v5e:2x4"), "small")
    one, three = (imread(tmp_path / name).shape[0] for name in ("one.png", "three.png"))
    assert three > 1.7 * one


@with_compiler
def test_a_plan_holds_what_the_compiler_says(model, tmp_path, capfd):
    """Arguments are the arrays' own bytes within padding; one scheme does not fit."""
    arguments = ["--topology", "v5e:2x4", "--batch", "8", "--context", "2048"]
    arguments += ["--prompt", "128", "--scheme", "bf16", "W4A16-KV8"]
    code = main(["plan", str(model), *arguments, "--out", str(tmp_path)])
    out, err = capfd.readouterr()
    assert code == 0, err
    assert "W4A16-KV8" in out and "Limits, not measurements" in out
    records = results.read(tmp_path / "small-v5e-2x4.jsonl")
    assert [record.config["scheme"] for record in records] == ["bf16", "W4A16-KV8"]
    for record in records:
        for found in record.metrics["programs"].values():
            own = found["weights_bytes"] + found["cache_bytes"]
            assert own <= found["arguments_bytes"] <= 1.05 * own
            assert found["compiled_bytes_per_device"] > 0.9 * found["bytes_read"] / 8
            assert found["sent_bytes_per_device"] > 0
    whole, coded = (record.metrics for record in records)
    assert coded["cache_GiB"] < 0.55 * whole["cache_GiB"]
    assert imread(tmp_path / "small-v5e-2x4.png").shape[2] == 4


@with_compiler
def test_what_does_not_fit_is_a_result(model, tmp_path, capfd):
    arguments = ["--topology", "v5e:2x4", "--batch", "4096", "--context", "8192"]
    arguments += ["--steps", "decode", "--scheme", "bf16", "--out", str(tmp_path)]
    assert main(["plan", str(model), *arguments]) == 3
    assert "does not fit" in capfd.readouterr().out
    (record,) = results.read(tmp_path / "small-v5e-2x4.jsonl")
    found = record.metrics["programs"]["decode"]
    assert found["needed_bytes"] > found["available_bytes"] > 15 * 2**30
