"""Checkpoints in and out: what other libraries make of ours, and we of theirs.

    python experiments/formats/run.py export WORK [MODEL ...] [ROW ...]
    python experiments/formats/run.py collect WORK

`export` writes the bundled model and a random one of every architecture in every scheme
into `WORK/ours`, each with the logits of `qjax.apply`; what is there stays. Between the
two, the peers open those and write their own into `WORK/theirs` (README.md has the
commands). `collect` loads theirs, and writes `results/matrix.jsonl`,
`results/architectures.jsonl` and the summary `results/formats.jsonl`: for each scheme
and peer the largest difference of a token's logits over the largest logit, the median
of the tokens.

Cost: an hour on one core, and half as much for the peers.
"""

import json
import re
import shutil
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import qjax
from qjax.commands.inputs import BUNDLED
from qjax.core.formats import Codebook, Int, channel, group, tensor
from qjax.core.qtensor import Activation
from qjax.results import Record, append, environment

RESULTS = Path(__file__).parent / "results"
SEEN, COMPARED = 8, 4  # tokens in a row, rows, of which logits are compared


@dataclass(frozen=True)
class Row:
    """A scheme in a format: the recipe that we export, and who writes the same."""

    format: str
    name: str
    recipe: Any = None
    theirs: tuple[str, ...] = ()
    coded_cache: bool = False

    @property
    def folder(self) -> str:
        """Where our export of it is."""
        return f"{self.format}-{self.name}".replace(" ", "_")

    @property
    def label(self) -> str:
        """The row's head."""
        return f"{self.format} {self.name}"


def integer(bits: int, rows: int | None = 32, **more: Any) -> Any:
    """Round to nearest in groups, or in channels."""
    shared = group(rows) if rows else channel()
    return qjax.RTN(weights=Int(bits, shared, **more))


INT8 = Activation(Int(8, tensor(), symmetric=False), dynamic=False)
ZERO = {"symmetric": False}
ct = partial(Row, "compressed-tensors")
ROWS = (
    ct("W4A16", integer(4), ("llmcompressor-w4", "llmcompressor-w4_gptq")),
    ct("W4A16 asym", integer(4, **ZERO), ("llmcompressor-w4_asym",)),
    ct("W4A16 channel", integer(4, None), ("llmcompressor-w4_channel",)),
    ct("W4A16 g_idx", qjax.GPTQ(weights=Int(4, group(32)), act_order="dynamic")),
    ct("W2A16", integer(2), ("llmcompressor-w2",)),
    ct("W3A16", integer(3), ("llmcompressor-w3",)),
    ct("W8A16", integer(8), ("llmcompressor-w8",)),
    ct(
        "W8A8",
        qjax.RTN("W8A8"),
        ("llmcompressor-w8a8", "llmcompressor-w8a8_smooth_gptq"),
    ),
    ct(
        "W8A8 static",
        qjax.RTN(weights=Int(8), activations=INT8),
        ("llmcompressor-w8a8_static",),
    ),
    ct("W4A8", qjax.RTN("W4A8"), ("llmcompressor-w4a8",)),
    ct("FP8", qjax.RTN("FP8"), ("llmcompressor-fp8",)),
    ct("FP8_DYNAMIC", qjax.RTN("FP8_DYNAMIC"), ("llmcompressor-fp8_dynamic",)),
    ct("FP8_BLOCK", qjax.RTN("FP8_BLOCK"), ("llmcompressor-fp8_block",)),
    ct(
        "FP8_DYNAMIC, cache",
        qjax.RTN("FP8_DYNAMIC"),
        ("llmcompressor-fp8_cache",),
        coded_cache=True,
    ),
    ct("NVFP4A16", qjax.RTN("NVFP4A16"), ("llmcompressor-nvfp4a16",)),
    ct("NVFP4", qjax.RTN("NVFP4"), ("llmcompressor-nvfp4",)),
    ct("MXFP4A16", qjax.RTN("MXFP4A16"), ("llmcompressor-mxfp4a16",)),
    ct("MXFP4", qjax.RTN("MXFP4"), ("llmcompressor-mxfp4",)),
    ct("MXFP8", qjax.RTN("MXFP8"), ("llmcompressor-mxfp8",)),
    ct(
        "mixed",
        (
            qjax.RTN("W8A8", targets="*down_proj*"),
            qjax.RTN("NVFP4A16", targets="*o_proj*"),
            integer(4),
        ),
        ("llmcompressor-mixed",),
    ),
    *(
        Row(
            "gptq",
            f"{bits} bits",
            integer(bits),
            (f"autoround-gptq-w{bits}", f"gptqmodel-w{bits}"),
        )
        for bits in (2, 3, 4, 8)
    ),
    Row("gptq", "4 bits asym", integer(4, **ZERO), ("autoround-gptq-w4_asym",)),
    Row("gptq", "4 bits channel", integer(4, None), ("autoround-gptq-w4_channel",)),
    Row(
        "gptq",
        "4 bits desc_act",
        qjax.GPTQ(weights=Int(4, group(32)), act_order="dynamic"),
        ("gptqmodel-w4_desc_act",),
    ),
    *(Row("gptq-v2", f"{bits} bits asym", integer(bits, **ZERO)) for bits in (2, 3, 8)),
    Row("gptq-v2", "4 bits asym", integer(4, **ZERO), ("gptqmodel-w4_asym",)),
    Row("awq", "4 bits", integer(4), ("autoround-awq-w4",)),
    Row("awq", "4 bits asym", integer(4, **ZERO), ("autoround-awq-w4_asym",)),
    Row("bitsandbytes", "NF4", qjax.RTN("NF4"), ("bitsandbytes-nf4",)),
    Row("bitsandbytes", "NF4 double", qjax.RTN("NF4_DQ"), ("bitsandbytes-nf4_double",)),
    Row(
        "bitsandbytes",
        "FP4",
        qjax.RTN(weights=Codebook("fp4", group(64))),
        ("bitsandbytes-fp4",),
    ),
    Row("bitsandbytes", "LLM.int8()", qjax.LLMInt8(), ("bitsandbytes-int8",)),
    *(
        Row("hqq", f"{bits} bits", qjax.HQQ(bits, 32), (f"hqq-w{bits}",))
        for bits in (1, 2, 3, 4, 8)
    ),
)
ARCHITECTURES = (
    *("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma2"),
    *("gemma3_text", "phi3", "gpt2", "opt", "bert"),
)


def tokens(folder: Path) -> np.ndarray:
    """A few random rows."""
    config = json.loads((folder / "config.json").read_text())
    draw = np.random.default_rng(3)
    return draw.integers(2, config["vocab_size"], (COMPARED, SEEN)).astype(np.int32)


def logits(f: Any, params: Any, ids: np.ndarray) -> np.ndarray:
    """What `qjax.apply` makes of them."""
    return np.asarray(jax.jit(qjax.apply(f))(params, jnp.asarray(ids)))


def export(work: Path, *only: str) -> None:
    """Write ours, and what we expect of them; a refusal is kept as a result.

    `only`: models, and folders of rows; all of either where none is named.
    """
    rows = [row for row in ROWS if row.folder in only] or ROWS
    every = ("bundled", *ARCHITECTURES)
    for kind in [each for each in every if each in only] or every:
        base = BUNDLED if kind == "bundled" else work / "architectures" / kind
        loaded = qjax.load_model(base, dtype=jnp.float32, scan_layers=True)[:2]
        for row in rows:
            _export(row, base, *loaded, work / "ours" / kind / row.folder)
        jax.clear_caches()


def _export(row: Row, base: Path, f: Any, params: Any, out: Path) -> None:
    if (out / "expected.npz").exists() or (out / "refused.json").exists():
        return
    shutil.rmtree(out, ignore_errors=True)
    ids = tokens(base)
    draw = np.random.default_rng(4)
    batches = [(jnp.asarray(draw.permutation(ids)),) for _ in range(2)]
    try:
        if row.coded_cache:
            f, params = qjax.quantize_cache(f, params, batches)
        qparams = qjax.quantize(f, params, row.recipe, batches, progress=False)
        expected = logits(f, qparams, ids)
        qjax.export(out, qparams, model=base, format=row.format)
    except (TypeError, ValueError) as error:
        out.mkdir(parents=True)
        (out / "refused.json").write_text(json.dumps({"refused": str(error)}))
        print(out.parent.name, out.name, error, flush=True)
        return
    np.savez(out / "expected.npz", tokens=ids, logits=expected)
    print("wrote", out.parent.name, out.name, flush=True)


def differences(out: Path) -> dict[str, Any]:
    """What the peers reported of one of our exports, by reader."""
    found = {}
    if (out / "refused.json").exists():
        found["export"] = json.loads((out / "refused.json").read_text())
    for file in sorted(out.glob("opened-*.json")):
        found[file.stem.removeprefix("opened-")] = json.loads(file.read_text())
    return found


def loaded(folder: Path) -> dict[str, Any]:
    """A peer's checkpoint in qjax, kept in `loaded.json`: see `_loaded`."""
    kept = folder / "loaded.json"
    if not kept.exists():
        kept.write_text(json.dumps(_loaded(folder)))
    return json.loads(kept.read_text())


def _loaded(folder: Path) -> dict[str, Any]:
    """The difference of logits, or why it is refused."""
    with np.load(folder / "logits.npz") as held:
        ids, expected = held["tokens"], held["logits"]
    try:
        f, params, _, _ = qjax.load_model(folder, dtype=jnp.float32)
    except ValueError as error:
        return {"refused": str(error).replace(str(folder), folder.name)}
    each = np.abs(logits(f, params, ids) - expected).max(-1) / np.abs(expected).max()
    return {"difference": float(np.median(each)), "worst": float(each.max())}


def record(label: str, reports: dict[str, Any]) -> Record:
    """One line: medians as metrics; worst tokens, refusals and versions as context."""
    metrics = {k: v["difference"] for k, v in reports.items() if "difference" in v}
    refused = {k: v["refused"][:200] for k, v in reports.items() if "refused" in v}
    # Some name files: where they were is of no interest.
    refused = {k: re.sub(r"\S*/(?=\S)", "", v) for k, v in refused.items()}
    worst = {k: v["worst"] for k, v in reports.items() if "worst" in v}
    peers = {k: v["versions"] for k, v in reports.items() if "versions" in v}
    context = {**environment(), "worst": worst, "refused": refused, "peers": peers}
    return Record(label, {"readers": sorted(reports)}, metrics, context)


def summary(format: str, found: list[dict[str, Any]]) -> Record:
    """A format in one line: how many schemes were opened, and the largest medians."""
    metrics: dict[str, Any] = {"schemes": len(found)}
    for way in ("out", "in"):
        each = [
            [v for k, v in reports.items() if k.startswith(f"{way}_")]
            for reports in found
        ]
        read = [[v["difference"] for v in x if "difference" in v] for x in each]
        metrics[f"{way}_opened"] = sum(bool(x) for x in read)
        if any(read):
            metrics[f"{way}_largest_difference"] = max(max(x) for x in read if x)
    return Record(format, {}, metrics, environment())


def opened(work: Path, row: Row) -> dict[str, Any]:
    """By architecture, the largest difference among its readers, or why there is none.

    A reader that refuses counts only where no other reads it.
    """
    found = {}
    for kind in ARCHITECTURES:
        reports = differences(work / "ours" / kind / row.folder).values()
        read = [each for each in reports if "difference" in each]
        if read:
            found[kind] = max(read, key=lambda each: each["difference"])
        elif reports:
            found[kind] = next(iter(reports))
    return found


def collect(work: Path) -> None:
    """Load theirs and write the tables' lines."""
    for name in ("matrix", "architectures", "formats"):
        (RESULTS / f"{name}.jsonl").unlink(missing_ok=True)
    formats: dict[str, list[dict[str, Any]]] = {}
    for row in ROWS:
        out = work / "ours" / "bundled" / row.folder
        reports = {f"out_{k}": v for k, v in differences(out).items()}
        for case in row.theirs:
            if (work / "theirs" / case / "logits.npz").exists():
                peer, _, rest = case.partition("-")
                again = f"in_{peer}" in reports
                name = f"in_{peer}_{rest}" if again else f"in_{peer}"
                reports[name] = loaded(work / "theirs" / case)
        formats.setdefault(row.format, []).append(reports)
        append(RESULTS / "matrix.jsonl", record(row.label, reports))
        print(row.label, reports, flush=True)
    for row in ROWS:
        append(RESULTS / "architectures.jsonl", record(row.label, opened(work, row)))
    for format, found in formats.items():
        append(RESULTS / "formats.jsonl", summary(format, found))


if __name__ == "__main__":
    # Every program runs once: most of the time goes into compiling.
    jax.config.update("jax_disable_most_optimizations", True)
    job, work, *more = sys.argv[1:]
    {"export": export, "collect": collect}[job](Path(work), *more)
