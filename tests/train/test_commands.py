"""`qjax qat` and `qjax finetune` on a tiny Llama."""

import gzip
import json
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import torch
from safetensors.numpy import load_file

import qjax
from qjax.cli import main
from qjax.commands.inputs import open_model
from qjax.train.loop import read_metrics

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
TRAINING = [
    "--length=16",
    "--batch=4",
    "--accumulate=2",
    "--steps=6",
    "--held-out=4",
    "--eval-every=3",
    "--save-every=2",
    "--learning-rate=3e-3",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return made(tmp_path_factory.mktemp("model"), 32)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Whose linears have whole groups in checkpoints."""
    return made(tmp_path_factory.mktemp("wide"), 128)


def made(folder, width):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    table = {chr(code): code for code in range(128)}
    letters = Tokenizer(models.WordLevel(table, unk_token="?"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=letters).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("the quick brown fox jumps over the lazy dog. " * 40)
    return file


def run(capsys, *arguments):
    code = main([str(a) for a in arguments])
    return code, capsys.readouterr()


def losses(folder):
    return [line["loss"] for line in read_metrics(folder) if "loss" in line]


def test_qat_trains_resumes_and_saves(model, text, tmp_path, capsys):
    options = ["--method=lsq", "--bits=2", f"--text={text}", *TRAINING]
    code, printed = run(capsys, "qat", model, tmp_path / "a", *options)
    assert code == 0, printed.err
    folder = tmp_path / "a.run"
    assert (folder / "loss.png").is_file()
    assert losses(folder)[-1] < losses(folder)[0]
    q = open_model(str(tmp_path / "a")).params
    kernel = q["layers"]["attn"]["q_proj"]["kernel"]
    assert isinstance(kernel, qjax.QTensor) and kernel.parts[0].format.bits == 2
    # Killed after the fourth step: the same run from its checkpoint.
    shutil.copytree(folder, tmp_path / "b.run")
    shutil.rmtree(tmp_path / "b.run" / "step-00000006")
    code, printed = run(capsys, "qat", model, tmp_path / "b", *options)
    assert code == 0, printed.err
    assert losses(tmp_path / "b.run") == losses(folder)
    arrays = [load_file(tmp_path / x / "arrays.safetensors") for x in "ab"]
    assert all(np.array_equal(arrays[0][n], arrays[1][n]) for n in arrays[0])


def test_qat_without_data_learns_the_teachers_logits(model, text, tmp_path, capsys):
    options = ["--teacher=self", "--data=generated", "--windows=6", *TRAINING]
    options += ["--method=ste", "--bits=8", "--kv-bits=8"]
    code, printed = run(capsys, "qat", model, tmp_path / "a", *options)
    assert code == 0, printed.err
    # At 8 bits the start is at the least that can be had: the teacher's entropy.
    found = losses(tmp_path / "a.run")
    assert max(found) - min(found) < 0.02 and max(found) < np.log(128)
    # Keys and values are served as they were trained.
    trained, tokens = open_model(str(tmp_path / "a")), np.arange(16)[None]
    exact = jax.jit(qjax.apply(trained.f))(trained.params, tokens)
    plain = open_model(str(model)).f
    for f, same in ((qjax.quantize_kv(plain, 8), True), (plain, False)):
        logits = jax.jit(qjax.apply(f))(trained.params, tokens)
        assert np.array_equal(logits, exact) == same
    code, printed = run(capsys, "qat", model, tmp_path / "b", *options, "--text=x")
    assert code == 1 and "--data generated needs no text" in printed.err
    code, printed = run(capsys, "qat", model, tmp_path / "b", "--text=no/file")
    assert code == 1 and "--text 'no/file' does not exist" in printed.err
    options[0] = "--teacher=bundled"
    code, printed = run(capsys, "qat", model, tmp_path / "b", *options)
    assert code == 1 and "has 4096 tokens, but" in printed.err


def test_finetune_writes_a_peft_folder(model, text, tmp_path, capsys):
    """From documents in a packed file."""
    options = ["--scheme=NF4_DQ", "--rank=4", "--dropout=0.1", *TRAINING]
    out, file = tmp_path / "adapter", tmp_path / "documents.jsonl.gz"
    with gzip.open(file, "wt") as packed:
        packed.write(2 * (json.dumps({"text": text.read_text()}) + "\n"))
    code, printed = run(capsys, "finetune", model, out, f"--text={file}", *options)
    assert code == 0, printed.err
    assert "trained parameters" in printed.out
    body = json.loads((out / "adapter_config.json").read_text())
    assert (body["r"], body["lora_dropout"]) == (4, 0.1)
    tensors = load_file(out / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    assert tensors[name].shape == (32, 4) and np.any(tensors[name])
    assert losses(tmp_path / "adapter.run")[-1] < losses(tmp_path / "adapter.run")[0]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
@pytest.mark.parametrize(
    "options",
    [
        ("--start=pissa",),
        ("--start=pissa", "--precision=bfloat16"),
        ("--start=loftq", "--scheme=NF4"),
        ("--start=qera", "--scheme=W4A16", "--targets", "*attn*"),
    ],
    ids=lambda options: " ".join(options),
)
def test_a_start_gives_peft_the_model_that_was_trained(
    options, wide, text, tmp_path, capsys
):
    """PEFT's held-out loss, of the folders alone, is what training ended with."""
    peft = pytest.importorskip("peft")
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        CompressedTensorsConfig,
    )

    decoded = {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    how = decoded if "--scheme=W4A16" in options else {}
    options = ["--rank=4", f"--text={text}", *TRAINING, *options]
    code, printed = run(capsys, "finetune", wide, tmp_path / "a", *options)
    assert code == 0, printed.err
    base = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    base = base["base_model_name_or_path"]
    assert base == str(wide if "--start=pissa" in options else tmp_path / "a.base")
    loaded = AutoModelForCausalLM.from_pretrained(base, dtype="float32", **how)
    if "--scheme=NF4" in options:  # whose product on a CPU rounds to bfloat16
        loaded = loaded.dequantize()
    loaded = peft.PeftModel.from_pretrained(loaded, str(tmp_path / "a")).eval()
    tokens = AutoTokenizer.from_pretrained(wide)(text.read_text())["input_ids"]
    held = torch.tensor(np.reshape(tokens[: len(tokens) // 16 * 16], (-1, 16))[-4:])
    with torch.no_grad():
        logits = loaded(held).logits[:, :-1].reshape(-1, 128)
    loss = torch.nn.functional.cross_entropy(logits, held[:, 1:].reshape(-1)).item()
    lines = read_metrics(tmp_path / "a.run")
    ours = [line["held_out_loss"] for line in lines if "held_out_loss" in line]
    rounding = 2e-3 if "--precision=bfloat16" in options else 1e-5
    assert ours[-1] == pytest.approx(loss, rel=rounding) and ours[-1] < ours[0]


def test_a_job_goes_on_with_its_own_options(model, text, tmp_path, capsys):
    options = ["--rank=4", f"--text={text}", *TRAINING]
    code, printed = run(capsys, "finetune", model, tmp_path / "a", *options)
    assert code == 0, printed.err
    again = [*options, f"--run={tmp_path / 'a.run'}"]
    code, printed = run(capsys, "finetune", model, tmp_path / "b", *again, "--rank=8")
    assert code == 1 and "--rank is 8, but the job in" in printed.err
    assert "began with 4: give that, or another OUT" in printed.err
    # The same folder in other words; an option that the job began without.
    file = tmp_path / "a.run" / "options.json"
    known = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in known.items() if k != "start"}))
    other = model.parent / "." / model.name / ".." / model.name
    wrong = [*again, "--start=pissa"]
    code, printed = run(capsys, "finetune", other, tmp_path / "b", *wrong)
    assert code == 1 and "--start is pissa, but" in printed.err
    code, printed = run(capsys, "finetune", other, tmp_path / "b", *again)
    assert code == 0, printed.err
    arrays = [load_file(tmp_path / x / "adapter_model.safetensors") for x in "ab"]
    assert all(np.array_equal(arrays[0][n], arrays[1][n]) for n in arrays[0])


def test_a_job_without_a_checkpoint_begins_again(wide, text, tmp_path, capsys):
    """Also with other options; the base of one that went no further is in the way."""
    options = ["--start=loftq", "--scheme=NF4", f"--text={text}", *TRAINING]
    (tmp_path / "a.run").mkdir()
    (tmp_path / "a.run" / "options.json").write_text('{"rank": "8"}')
    (tmp_path / "a.base").mkdir()
    code, printed = run(capsys, "finetune", wide, tmp_path / "a", *options)
    assert code == 1 and "or one that made no checkpoint: remove it" in printed.err
    (tmp_path / "a.base").rmdir()
    code, printed = run(capsys, "finetune", wide, tmp_path / "a", *options)
    assert code == 0, printed.err
    assert json.loads((tmp_path / "a.run" / "options.json").read_text())["rank"] == "16"


def test_a_mesh_and_a_precision(model, text, tmp_path, capsys):
    """On four devices the losses of one; in bfloat16 what is trained stays float32."""
    options = ["--scheme=NF4_DQ", "--rank=4", f"--text={text}", *TRAINING]
    found = []
    for name, mesh in (("a", []), ("b", ["--fsdp=2", "--data-parallel=2"])):
        code, printed = run(capsys, "finetune", model, tmp_path / name, *options, *mesh)
        assert code == 0, printed.err
        found.append(losses(tmp_path / f"{name}.run"))
    np.testing.assert_allclose(*found, rtol=2e-4)
    options = ["--precision=bfloat16", "--method=lsq", f"--text={text}", *TRAINING]
    code, printed = run(capsys, "qat", model, tmp_path / "c", *options)
    assert code == 0, printed.err
    folder = tmp_path / "c.run" / "step-00000006" / "arrays"
    found = ocp.StandardCheckpointer().metadata(folder)
    arrays = jax.tree.leaves(getattr(found, "item_metadata", found))
    assert {str(x.dtype) for x in arrays} == {"float32", "int32"}
    params = open_model(str(tmp_path / "c")).params
    assert params["norm"]["scale"].dtype == "bfloat16"
    assert losses(tmp_path / "c.run")[-1] < losses(tmp_path / "c.run")[0]
    code, printed = run(capsys, "qat", model, tmp_path / "d", *options, "--fsdp=3")
    assert code == 1 and "which 3 devices cannot share evenly" in printed.err


def test_errors_are_sentences(model, text, tmp_path, capsys):
    (tmp_path / "there").mkdir()
    code, printed = run(capsys, "finetune", model, tmp_path / "there")
    assert code == 1 and "exists; give the name of a new folder" in printed.err
    for wrong, said in (
        (["--start=loftq"], "--start loftq makes up for what coding loses: give"),
        (["--start=pissa", "--dora"], "--dora starts from the weights as they are"),
        (["--start=loftq", "--scheme=NVFP4A16"], "a scale that linears with one input"),
        (["--start=pissa", "--scheme=W8A8"], "W8A8 codes inputs, which --start pissa"),
        (["--fsdp=2", "--batch=5"], "which 2 devices cannot share evenly"),
    ):
        code, printed = run(capsys, "finetune", model, tmp_path / "x", *wrong)
        assert code == 1 and said in printed.err
    options = [f"--text={text}", "--steps=0"]
    code, printed = run(capsys, "qat", model, tmp_path / "x", *options)
    assert code == 1 and "--steps is 0: give 1 or more" in printed.err
    code, printed = run(capsys, "qat", model, tmp_path / "x", "--bits=1")
    assert code == 1 and "LSQ.bits must be" in printed.err
