"""What llm-compressor makes of a model: perplexity, layer errors, seconds, memory.

Runs in the environment of `scripts/parity/llmcompressor_env.sh` and needs the tokens
that `tokens.py` writes. Each method runs in a process of its own: `oneshot` on the
model in float32 (cold), perplexity of the result, then warm: the same call again on a
fresh copy; with `--layers` once more, untimed, to compute the relative output error of
every GPTQ layer, `sqrt(tr(E H E^T) / tr(W H W^T))`. Seconds are those of the whole
`oneshot` call with the model already loaded; importing and loading are given beside.

Command: <environment>/bin/python experiments/papers/ptq/peer.py --all --layers
"""

import argparse
import json
import math
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import llmcompressor.modifiers.gptq.base as gptq_base
import numpy as np
import psutil
import torch
from averages import averaged
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from loguru import logger
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

IMPORT_SECONDS = time.time() - psutil.Process().create_time()
ROOT = Path(__file__).parents[3]
RESULTS = Path(__file__).parent / "results" / "peer.jsonl"
PACKAGES = (
    "llmcompressor", "compressed-tensors", "torch", "transformers", "numpy",
)  # fmt: skip


def rtn(scheme: str) -> list[Any]:
    return [QuantizationModifier(targets="Linear", scheme=scheme, ignore=["lm_head"])]


def gptq(scheme: str, **options: Any) -> list[Any]:
    made = GPTQModifier(targets="Linear", scheme=scheme, ignore=["lm_head"], **options)
    return [made]


def awq(scheme: str, duo: bool | str = True) -> list[Any]:
    return [AWQModifier(duo_scaling=duo, n_grid=20), *rtn(scheme)]


# Everything that is not named here is llm-compressor's default: GPTQ has actorder
# "static", dampening 0.01 and blocks of 128; W*A16 are symmetric groups of 128.
RECIPES: dict[str, Callable[[], list[Any]]] = {
    "rtn-w4a16": lambda: rtn("W4A16"),
    "rtn-w4a16-asym": lambda: rtn("W4A16_ASYM"),
    "rtn-w3a16": lambda: rtn("W3A16"),
    "gptq-w4a16": lambda: gptq("W4A16"),
    "gptq-w4a16-noact": lambda: gptq("W4A16", actorder=None),
    "gptq-w3a16": lambda: gptq("W3A16"),
    "gptq-w3a16-noact": lambda: gptq("W3A16", actorder=None),
    "awq-w4a16-asym": lambda: awq("W4A16_ASYM"),
    "smoothquant-gptq-w8a8": lambda: [
        SmoothQuantModifier(smoothing_strength=0.8),
        *gptq("W8A8"),
    ],
    "smoothquant-rtn-w8a8": lambda: [
        SmoothQuantModifier(smoothing_strength=0.8),
        *rtn("W8A8"),
    ],
    "rtn-w8a8": lambda: rtn("W8A8"),
    "fp8-dynamic": lambda: rtn("FP8_DYNAMIC"),
}
DATA_FREE = ("rtn-", "fp8-")
QUIET = {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def load_tokens(path: Path) -> tuple[np.ndarray, dict[str, Any]]:
    """Rows of tokens, and what they are."""
    with np.load(path) as held:
        return held["tokens"], json.loads(str(held["about"]))


def load_model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def quantize(
    model: Any, recipe: list[Any], rows: np.ndarray | None, batch: int
) -> float:
    """Seconds of the call; the model is changed in place."""
    options: dict[str, Any] = {}
    if rows is not None:
        ids = rows.tolist()
        ones = np.ones_like(rows).tolist()
        options = {
            "dataset": Dataset.from_dict({"input_ids": ids, "attention_mask": ones}),
            "num_calibration_samples": len(rows),
            "max_seq_length": rows.shape[1],
            "shuffle_calibration_samples": False,
            "batch_size": batch,
        }
    # It insists on a tokenizer, which tokenised rows never use.
    unused = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel()))
    began = time.perf_counter()
    oneshot(model=model, recipe=recipe, processor=unused, **options)
    return time.perf_counter() - began


@torch.no_grad()
def quality(model: Any, exact: Any, rows: np.ndarray, batch: int = 8) -> list[float]:
    """Perplexity, and KL divergence from the exact model, nats for each token.

    Protocol "nonoverlap": every token of a window but its first is scored.
    """
    totals = [0.0, 0.0]
    for start in range(0, len(rows), batch):
        ids = torch.from_numpy(rows[start : start + batch]).long()
        low, full = (
            torch.log_softmax(m(ids, use_cache=False).logits[:, :-1].float(), -1)
            for m in (model, exact)
        )
        nll = -low.gather(-1, ids[:, 1:, None])
        totals[0] += nll.double().sum().item()
        totals[1] += (full.exp() * (full - low)).double().sum().item()
    tokens = len(rows) * (rows.shape[1] - 1)
    return [math.exp(totals[0] / tokens), totals[1] / tokens]


def qualities(model: Any, exact: Any, texts: dict[str, Any]) -> dict[str, list[float]]:
    """Quality on each text."""
    return {name: quality(model, exact, text[0]) for name, text in texts.items()}


@contextmanager
def patched(owner: Any, name: str, new: Any) -> Iterator[None]:
    """An attribute replaced for a while."""
    old = getattr(owner, name)
    setattr(owner, name, new)
    yield
    setattr(owner, name, old)


@contextmanager
def search_errors(kept: list[dict[str, Any]]) -> Iterator[None]:
    """Keeps what AWQ logs of each mapping; costs nothing."""

    def log(modifier: Any) -> None:
        kept.extend(dict(row) for row in modifier._error_metrics)

    with patched(AWQModifier, "_log_error_metrics", log):
        yield


@contextmanager
def layer_errors(kept: list[dict[str, Any]]) -> Iterator[None]:
    """Keeps each GPTQ layer's loss, and its relative output error, which costs time."""
    solve, solve_list = gptq_base.quantize_weight, GPTQModifier.compress_module_list

    def solve_one_by_one(modifier: Any, modules: list[Any]) -> None:
        for module in modules:
            kept.append({"name": modifier._module_names[module]})
            solve_list(modifier, [module])

    def solve_and_keep(weights: Any, hessians: Any, **options: Any) -> Any:
        w, h = weights[0].double(), hessians[0].double()
        found, losses, fell_back = solve(weights=weights, hessians=hessians, **options)
        error = found[0].double() - w
        ratio = ((error @ h) * error).sum() / ((w @ h) * w).sum()
        kept[-1] |= {"relative_error": float(ratio.sqrt()), "loss": float(losses[0])}
        kept[-1]["rtn_fallback"] = bool(fell_back[0])
        return found, losses, fell_back

    with (
        patched(gptq_base, "quantize_weight", solve_and_keep),
        patched(GPTQModifier, "compress_module_list", solve_one_by_one),
    ):
        yield


def resident() -> int:
    return psutil.Process().memory_info().rss


def highest() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run(given: argparse.Namespace) -> dict[str, Any]:
    """The metrics of one method on one model."""
    torch.set_num_threads(given.threads)
    logger.remove()
    # CPU-only: it pins memory for an accelerator without asking for one.
    IntermediatesCache.pin_memory = lambda self, *args, **kwargs: None
    rows = None
    if not given.method.startswith(DATA_FREE):
        rows = load_tokens(given.tokens / "calibration.npz")[0]
    metrics: dict[str, Any] = {"import_seconds": IMPORT_SECONDS}
    metrics["rss_import"] = resident()
    began = time.perf_counter()
    model = load_model(given.model)
    metrics |= {"load_seconds": time.perf_counter() - began, "rss_model": resident()}
    texts = {stem: load_tokens(given.tokens / f"{stem}.npz") for stem in given.evaluate}
    exact = load_model(given.model)
    if given.method == "float":
        return metrics | averaged([qualities(model, exact, texts)])
    recipe, mappings, layers = RECIPES[given.method], [], []
    first, *others = given.batches
    with search_errors(mappings):
        metrics["cold_seconds"] = quantize(model, recipe(), rows, first)
    metrics["peak_rss"] = highest()
    runs = [qualities(model, exact, texts)]
    del model
    if not given.once:
        again = load_model(given.model)
        metrics["warm_seconds"] = quantize(again, recipe(), rows, first)
        del again
    for batch in others if rows is not None else ():
        again = load_model(given.model)
        quantize(again, recipe(), rows, batch)
        runs.append(qualities(again, exact, texts))
    if given.layers and "gptq" in given.method:
        with layer_errors(layers):
            quantize(load_model(given.model), recipe(), rows, first)
    return metrics | averaged(runs) | {"mappings": mappings, "layers": layers}


def record(given: argparse.Namespace, metrics: dict[str, Any]) -> dict[str, Any]:
    """The line that is written."""
    options = {k: str(v) if isinstance(v, Path) else v for k, v in vars(given).items()}
    config = {key: options[key] for key in ("method", "batches", "threads")}
    texts = {
        stem: load_tokens(given.tokens / f"{stem}.npz")
        for stem in ("calibration", *given.evaluate)
    }
    shown = [*command(given, inside(given.model)), "--tokens", inside(given.tokens)]
    context = {
        "model": given.model.name,
        "texts": {s: {**a, "shape": list(t.shape)} for s, (t, a) in texts.items()},
        "versions": {"python": platform.python_version()}
        | {package: version(package) for package in PACKAGES},
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "torch_threads": given.threads,
        "command": "experiments/papers/ptq/peer.py " + " ".join(shown),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    label = f"llm-compressor {given.method} {given.model.name}"
    return {"label": label, "config": config, "metrics": metrics, "context": context,
            "series": None}  # fmt: skip


def inside(path: Path) -> str:
    """The path from the repository's root, or its name if it lies elsewhere."""
    path = path.resolve()
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name)


def command(given: argparse.Namespace, model: str) -> list[str]:
    """The options that run this method on this model again."""
    made = ["--method", given.method, "--model", model]
    made += ["--batches", *map(str, given.batches)]
    made += ["--threads", str(given.threads), "--evaluate", *given.evaluate]
    made += ["--once"] if given.once else []
    return made + (["--layers"] if given.layers else [])


def replace(path: Path, row: dict[str, Any]) -> None:
    """Write a row in place of an earlier one of the same label."""
    kept = path.read_text().splitlines() if path.exists() else []
    kept = [line for line in kept if json.loads(line)["label"] != row["label"]]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*kept, json.dumps(row)]) + "\n")


def run_all(given: argparse.Namespace) -> None:
    """Every method on every model, one process each."""
    for model in given.models:
        for method in given.methods or ("float", *RECIPES):
            given.method, given.model = method, model
            options = [*command(given, str(model)), "--tokens", str(given.tokens)]
            threads = {"OMP_NUM_THREADS": str(given.threads)}
            began = time.perf_counter()
            done = subprocess.run(
                [sys.executable, __file__, *options],
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, **QUIET, **threads},
            )
            seconds = time.perf_counter() - began
            if done.returncode:
                raise SystemExit(f"{method} on {model} failed")
            row = json.loads(done.stdout.splitlines()[-1])
            row["metrics"]["process_seconds"] = seconds
            replace(given.out, row)
            shown = {k: v for k, v in row["metrics"].items() if not isinstance(v, list)}
            print(row["label"], json.dumps(shown), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    bundled, runs = ROOT / "qjax/models/tiny_llama", ROOT / "runs/ptq"
    parser.add_argument("--all", action="store_true", help="every method and model")
    parser.add_argument("--models", type=Path, nargs="*",
                        default=[bundled, runs / "tiny_llama_outliers"])  # fmt: skip
    parser.add_argument("--methods", nargs="*", choices=("float", *RECIPES))
    parser.add_argument("--method", choices=("float", *RECIPES), help="one, as JSON")
    parser.add_argument("--model", type=Path, default=bundled)
    parser.add_argument("--tokens", type=Path, default=runs, help="folder of tokens.py")
    parser.add_argument("--evaluate", nargs="*", default=["pydoc", "wikitext2"])
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 2, 4],
                        help="rows of a batch; the first is timed")  # fmt: skip
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--once", action="store_true", help="no warm call")
    parser.add_argument("--layers", action="store_true", help="errors of GPTQ's layers")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    if given.all:
        run_all(given)
    else:
        print(json.dumps(record(given, run(given))))


if __name__ == "__main__":
    main()
