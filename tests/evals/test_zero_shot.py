"""The adapter answers lm_eval's requests as its `hf` adapter does in torch."""

import json
import shutil

import pytest

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from tokenizers import Tokenizer, decoders

from qjax import results
from qjax.cli import main
from qjax.commands.inputs import open_model
from qjax.evals.tasks import evaluate_tasks
from qjax.evals.zero_shot import HarnessModel

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")

LONG = "the quick brown fox jumps over the lazy dog while it rains in spain " * 2
PAIRS = [
    ("a question", " yes"),
    ("a question", " no"),
    ("spaces go along  ", "with it"),
    ("", "nothing before"),
    ("\x02begins so", " itself"),
    (LONG, " and more"),
    ("x", "y" * 64),
]
TEXTS = ["short", LONG + LONG, "", "q"]
STOPS = [
    ("write", {"until": ["e", "\n"], "max_gen_toks": 12}),
    ("write on " + LONG, {"until": ["e", "\n"], "max_gen_toks": 12}),
    ("\x02it has one", {"until": "qz", "max_gen_toks": 12, "top_k": 3}),
]


@pytest.fixture(scope="module")
def spoken(folder, tmp_path_factory):
    """The tiny Llama with a tokenizer that has first and last tokens."""
    copy = tmp_path_factory.mktemp("spoken") / "model"
    shutil.copytree(folder, copy)
    tokenizer = Tokenizer.from_file(str(copy / "tokenizer.json"))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(copy / "tokenizer.json"))
    said = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "?"}
    said |= {"bos_token": "\x02", "eos_token": "\x03"}
    (copy / "tokenizer_config.json").write_text(json.dumps(said))
    config = json.loads((copy / "config.json").read_text())
    config |= {"bos_token_id": 2, "eos_token_id": 3}
    (copy / "config.json").write_text(json.dumps(config))
    return copy


@pytest.fixture(scope="module")
def ours(spoken):
    model = open_model(str(spoken))
    f, params = model.run(model.params, "float32")
    context = model.config.context
    return HarnessModel(f, params, model.tokenizer, context, batch=3, progress=False)


@pytest.fixture(scope="module")
def theirs(spoken):
    pytest.importorskip("torch")
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    return huggingface.HFLM(str(spoken), dtype="float32", device="cpu", batch_size=3)


def requests(kind, arguments):
    return [Instance(kind, {}, given, i) for i, given in enumerate(arguments)]


def test_log_likelihoods_are_those_of_the_hf_adapter(ours, theirs):
    asked = requests("loglikelihood", PAIRS)
    expected = theirs.loglikelihood(asked, disable_tqdm=True)
    found = ours.loglikelihood(asked)
    for (nats, greedy), (their_nats, their_greedy) in zip(found, expected, strict=True):
        assert nats == pytest.approx(their_nats, rel=2e-5)
        assert greedy == their_greedy


def test_rolling_log_likelihoods_are_those_of_the_hf_adapter(ours, theirs):
    asked = requests("loglikelihood_rolling", [(text,) for text in TEXTS])
    expected = theirs.loglikelihood_rolling(asked, disable_tqdm=True)
    found = ours.loglikelihood_rolling(asked)
    assert found == pytest.approx(expected, rel=2e-5)
    assert found[2] == 0


def test_texts_are_those_of_the_hf_adapter(ours, theirs):
    expected = theirs.generate_until(requests("generate_until", STOPS), True)
    found = ours.generate_until(requests("generate_until", STOPS))
    assert found == expected
    assert any(found)
    assert not any("e" in text for text in found[:2])


def test_requests_that_cannot_be_met_are_named(ours, folder):
    asked = requests("generate_until", [("a", {"num_beams": 3})])
    with pytest.raises(ValueError, match="generation_kwargs: num_beams is 3"):
        ours.generate_until(asked)
    asked = requests("generate_until", [("a", {"do_sample": True, "top_k": 3})])
    with pytest.raises(ValueError, match="top_k is 3"):
        ours.generate_until(asked)
    with pytest.raises(ValueError, match="no chat template"):
        ours.apply_chat_template([{"role": "user", "content": "hello"}])
    with pytest.raises(ValueError, match="no tokenizer"):
        HarnessModel(ours.f, ours.params, None, 8)
    plain = open_model(str(folder))
    silent = HarnessModel(plain.f, plain.params, plain.tokenizer, 64, progress=False)
    with pytest.raises(ValueError, match="neither bos_token nor eos_token"):
        silent.loglikelihood(requests("loglikelihood", [("", "a")]))


CHOICES = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: items.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{query}}}}"
doc_to_choice: choices
doc_to_target: gold
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""
ITEMS = [
    {"query": "one", "choices": ["two", "six"], "gold": 0},
    {"query": "red", "choices": ["blue", "green", "grey"], "gold": 2},
    {"query": "cat", "choices": ["dog", "cow"], "gold": 1},
]


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Two task files and their items, in two folders."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    made, data = tmp_path / "files", tmp_path / "data"
    made.mkdir()
    data.mkdir()
    for name in ("local_one", "local_two"):
        (made / f"{name}.yaml").write_text(CHOICES.format(name=name))
    lines = "".join(json.dumps(item) + "\n" for item in ITEMS)
    (data / "items.jsonl").write_text(lines)
    return made, data


def test_local_tasks_are_scored_and_written_down(ours, spoken, files, tmp_path, capfd):
    made, data = files
    out = tmp_path / "lines.jsonl"
    arguments = ["eval", spoken, "--tasks", "local_one,local_two", "--out", out]
    arguments += ["--task-files", made, "--task-data", data, "--batch", "3"]
    assert main([str(each) for each in arguments]) == 0, capfd.readouterr().err
    assert "local_two" in capfd.readouterr().out
    one, two = results.read(out)
    hits = []
    for item in ITEMS:
        asked = [(item["query"], f" {choice}") for choice in item["choices"]]
        nats = [x for x, _ in ours.loglikelihood(requests("loglikelihood", asked))]
        hits.append(nats.index(max(nats)) == item["gold"])
    mean = sum(hits) / 3
    assert one.metrics["acc"] == two.metrics["acc"] == pytest.approx(mean)
    spread = (sum((hit - mean) ** 2 for hit in hits) / 2 / 3) ** 0.5
    assert one.metrics["acc_stderr"] == pytest.approx(spread)
    about = {name: one.context[name] for name in ("task", "items", "all_items")}
    assert about == {"task": "local_one", "items": 3, "all_items": 3}
    assert one.config["task"]["tasks"] == ["local_one,local_two"]


def test_tasks_that_cannot_be_had_are_named(ours, files):
    made, data = files
    [one] = evaluate_tasks(ours, ["*_one"], files=made, data=data, limit=2)
    assert (one.items, one.all_items) == (2, 3)
    with pytest.raises(OSError, match=r"tasks local_one one cannot be made, or its"):
        evaluate_tasks(ours, ["local_one"], files=made)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        evaluate_tasks(ours, ["local_one"], files=made / "nowhere")
    with pytest.raises(ValueError, match="limit is 0"):
        evaluate_tasks(ours, ["local_one"], files=made, limit=0)
    with pytest.raises(ValueError, match="fewshot is -1"):
        evaluate_tasks(ours, ["local_one"], files=made, fewshot=-1)
    with pytest.raises(ValueError, match="no task is named"):
        evaluate_tasks(ours, [])


def test_the_command_asks_for_one_thing(spoken, capfd):
    def fails(*options):
        assert main(["eval", str(spoken), *options]) == 1
        return capfd.readouterr().err

    assert "leave out --reference" in fails("--tasks", "piqa", "--dataset", "pydoc")
    assert "need --tasks" in fails("--limit", "3")
