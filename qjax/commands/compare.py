"""`qjax compare`: recipes side by side on one model and one text."""

import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)

from qjax import results
from qjax.catalogue import COMPARED, Named, expanded
from qjax.commands.calibration import Batched, CalibrationText
from qjax.commands.inputs import Dtype, Model, TextOptions, open_model
from qjax.commands.memory import PeakMemory
from qjax.commands.output import wide_console
from qjax.core.qtensor import is_quantized
from qjax.data import Text
from qjax.evals import Divergence, Protocol, Yardstick
from qjax.io.checkpoint import save
from qjax.io.describe import describe
from qjax.plots import compare_plot
from qjax.quantize import quantize
from qjax.recipes import needs_data, steps_of
from qjax.results import Record

Batches = list[tuple[np.ndarray, ...]]


@dataclass(frozen=True)
class Compare:
    """Quantize a model by several recipes and compare what comes out.

    Prints a table and writes OUT/compare.jsonl and OUT/compare.png. Bits per weight
    count every array a quantized weight keeps, over the quantized weights alone.
    """

    model: str = "bundled"
    """A local Hugging Face folder, a hub id, or "bundled" (a 7M-parameter Llama)."""
    recipes: tuple[str, ...] = COMPARED
    """Short names, such as hqq-int3-g128 or nf4, schemes, such as W4A16, "data-free",
    "calibrated", "blockwise" or "lowrank": all of a kind."""
    text: tyro.conf.OmitArgPrefixes[TextOptions] = field(default_factory=TextOptions)
    calibration: CalibrationText = field(default_factory=CalibrationText)
    dtype: Dtype = "float32"
    """Type to compute in; quantization starts from the checkpoint's own."""
    out: Path = Path("results/compare")
    """Folder for compare.jsonl and compare.png."""

    def run(self) -> None:
        """Evaluate full precision and every recipe; print, write, draw."""
        chosen = expanded(self.recipes)
        text, model = self.text.load(), open_model(self.model, in_float=True)
        tokens, protocol = self.text.encode(text, model)
        context = self._context(model, text, tokens)
        calibration = Batched([])
        if any(calibrated(one.recipe) for one in chosen):
            calibration = self.calibration.batches(model, (text, tokens.size))
            context |= {"calibration": self._calibration(calibration.batches)}
        lines = self.out / "compare.jsonl"
        lines.unlink(missing_ok=True)
        records = []
        for record in _rows(
            model,
            chosen,
            calibration,
            tokens,
            protocol,
            self.dtype,
            context,
            self.calibration.method_seed,
        ):
            results.append(lines, record)
            records.append(record)
        title = f"{model.name}: recipes compared"
        subtitle = _subtitle(model, text, records[0], protocol, self.dtype)
        compare_plot(self.out / "compare.png", records, title, subtitle)
        console = wide_console()
        console.print(results.table(records, title, _caption(subtitle, protocol)))
        console.print(f"wrote {lines} and {self.out / 'compare.png'}")

    def _context(self, model: Model, text: Text, tokens: np.ndarray) -> dict[str, Any]:
        return {
            "model": {"name": model.name, "weights": model.weights},
            "text": {"name": text.name, "sha256": text.sha256, "tokens": tokens.size},
            "dtype": self.dtype,
            **results.environment(),
        }

    def _calibration(self, batches: Batches) -> dict[str, Any]:
        rows = sum(len(rows) for rows, *_ in batches)
        length = max(rows.shape[1] for rows, *_ in batches)
        return {
            **self.calibration.origin(),
            "rows": rows,
            "length": length,
        }


def _rows(
    model: Model,
    chosen: list[Named],
    calibration: Batched,
    tokens: np.ndarray,
    protocol: Protocol,
    dtype: Dtype,
    context: dict[str, Any],
    seed: int,
) -> Iterator[Record]:
    """One record a recipe, full precision first."""
    yardstick = Yardstick(model.run(model.params, dtype), tokens, protocol)
    batches = len(yardstick.batches)
    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(TextColumn("{task.description}"), *columns, console=console) as bar:
        whole = bar.add_task("recipes", total=1 + len(chosen))
        part = bar.add_task("", total=batches)
        for one in (None, *chosen):
            label = "full precision" if one is None else one.label
            bar.reset(part, description=f"{label}: quantizing", total=batches)
            params, made = _quantized(model, one, calibration, seed)
            bar.update(part, description=f"{label}: evaluating")
            found = yardstick.measure(
                model.run(params, dtype),
                progress=False,
                advance=lambda: bar.advance(part),
            )
            record = _record(label, one, made | _measured(found), found, context)
            bar.console.print(_line(record))
            bar.advance(whole)
            yield record


def calibrated(recipe: Any) -> bool:
    """Whether a recipe needs calibration data."""
    return any(needs_data(step) for step in steps_of(recipe))


def _quantized(
    model: Model, one: Named | None, calibration: Batched, seed: int
) -> tuple[Any, dict[str, Any]]:
    """The parameters of a row, with what making and keeping them took."""
    if one is None:
        sizes = {"bits_per_weight": _float_bits(model.params)}
        return model.params, sizes | {"disk_bytes": disk_bytes(model.params)}
    began = time.perf_counter()
    with PeakMemory() as peak:
        params = jax.block_until_ready(
            quantize(
                model.f,
                model.params,
                one.recipe,
                calibration.batches if calibrated(one.recipe) else None,
                example=None if calibrated(one.recipe) else model.example,
                mask_fn=calibration.mask_fn if calibrated(one.recipe) else None,
                progress=False,
                key=jax.random.key(seed),
            )
        )
    made = {
        "quantize_seconds": time.perf_counter() - began,
        "quantize_peak_bytes": peak.rise,
        "bits_per_weight": quantized_bits(params),
        "disk_bytes": disk_bytes(params),
    }
    return params, made


def quantized_bits(params: Any) -> float:
    """Bits per weight over the quantized leaves, every array of theirs counted."""
    leaves = jax.tree.leaves(params, is_leaf=is_quantized)
    found = [leaf for leaf in leaves if is_quantized(leaf)]
    return 8 * sum(leaf.nbytes for leaf in found) / sum(leaf.size for leaf in found)


def _float_bits(params: Any) -> float:
    leaves = jax.tree.leaves(params)
    return 8 * sum(leaf.nbytes for leaf in leaves) / sum(leaf.size for leaf in leaves)


def disk_bytes(params: Any) -> int:
    """Size of the folder that `qjax.save` writes."""
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder) / "saved", params)
        return sum(p.stat().st_size for p in Path(folder).rglob("*") if p.is_file())


def _measured(found: Divergence) -> dict[str, Any]:
    return {
        "perplexity": found.candidate.perplexity,
        "nll": found.candidate.nll,
        "accuracy": found.candidate.accuracy,
        "kl": found.kl,
        "top1_agreement": found.top1_agreement,
        "run_peak_bytes": found.run_bytes,
        "tokens_per_second": found.tokens_per_second,
    }


def _record(
    label: str,
    one: Named | None,
    metrics: dict[str, Any],
    found: Divergence,
    context: dict[str, Any],
) -> Record:
    protocol = describe(found.protocol) | {"name": found.protocol.name}
    config = None if one is None else describe(one.recipe)
    scored = {"protocol": protocol, "scored_tokens": found.tokens}
    series = None if one is None else one.series
    return Record(label, config, metrics, context | scored, series)


def _line(record: Record) -> str:
    m = record.metrics
    return (
        f"{record.label:<15} {m['bits_per_weight']:6.3f} bits, "
        f"perplexity {m['perplexity']:.3f}, KL {m['kl']:.5f}, "
        f"{m['tokens_per_second']:,.0f} tokens/s"
    )


def _subtitle(
    model: Model, text: Text, first: Record, protocol: Protocol, dtype: Dtype
) -> str:
    how = "side by side" if protocol.stride is None else f"{protocol.stride} apart"
    return (
        f"{model.weights / 1e6:,.1f}M parameters; "
        f"{text.name} (sha256 {text.sha256[:8]}), "
        f"{first.context['scored_tokens']:,} tokens scored in windows of "
        f"{protocol.window} {how}; {dtype} on {jax.devices()[0].platform}"
    )


def _caption(subtitle: str, protocol: Protocol) -> str:
    batch = f"{protocol.batch} x {protocol.window} tokens"
    return "\n".join(
        (
            subtitle,
            "*: on the Pareto front of bits per weight and perplexity",
            "quantize: s with compilation; peak, the rise of resident memory (of the "
            "accelerator's, where it counts)",
            f"run, one batch of {batch}: peak, weights, temporaries and logits as XLA "
            "counts; tokens per s without compilation",
        )
    )
