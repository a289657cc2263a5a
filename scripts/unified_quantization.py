"""Quantize a model by one of five methods, with calibration, and save it.

    python scripts/unified_quantization.py --model bundled --method gptq \\
        --output runs/tiny-gptq --num-calibration-samples 64

- gptq: GPTQ (W4A16); --dampening-frac
- awq: AWQ, then rounding to nearest (W4A16_ASYM); --duo-scaling
- smoothquant: SmoothQuant, then GPTQ (W8A8); --smoothing-strength, --dampening-frac
- simple_ptq: rounding to nearest (W8A8)
- autoround: AutoRound (W4A16); --iters

OUTPUT holds the quantized weights, the model's configuration and tokenizer, and
`report.jsonl`: what became of each leaf, site and mapping. Evaluate it on another text
than it was calibrated with: `qjax eval OUTPUT --dataset wikitext2`.
"""

import dataclasses
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import tyro

from qjax.commands.inputs import Model, TextOptions, open_model
from qjax.commands.output import wide_console
from qjax.commands.quantize import SHELL
from qjax.data import encode_text, windows
from qjax.io.checkpoint import check_target, save
from qjax.methods import AWQ, GPTQ, RTN, AutoRound, SimplePTQ, SmoothQuant
from qjax.quantize import quantize_with_report
from qjax.recipes import needs_data, steps_of

SCHEMES = {
    "gptq": "W4A16",
    "awq": "W4A16_ASYM",
    "smoothquant": "W8A8",
    "simple_ptq": "W8A8",
    "autoround": "W4A16",
}
# The options that belong to some methods only.
OPTIONS = {
    "dampening_frac": ("gptq", "smoothquant"),
    "duo_scaling": ("awq",),
    "smoothing_strength": ("smoothquant",),
    "iters": ("autoround",),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """What to quantize, how, and with which text."""

    model: str
    """A Hugging Face folder, a hub id, or "bundled"."""
    method: Literal["gptq", "awq", "smoothquant", "autoround", "simple_ptq"]
    """The method."""
    output: Path
    """The folder to write; it must not exist, unless --overwrite."""
    scheme: str | None = None
    """Formats by llm-compressor's name (None: the method's own, see above)."""
    targets: tuple[str, ...] = ()
    """Patterns: globs on paths, re:..., Linear, Conv, Embedding (all but the head)."""
    ignore: tuple[str, ...] = ()
    """Patterns of the weights to leave in float."""
    dampening_frac: float | None = None
    """Share of the mean diagonal added to GPTQ's Hessian (0.01)."""
    duo_scaling: Literal["true", "false", "both"] | None = None
    """Whether AWQ's scales follow the weights too (true)."""
    smoothing_strength: float | None = None
    """How far SmoothQuant moves outliers into the weights, 0 to 1 (0.8)."""
    iters: int | None = None
    """Steps of AutoRound (200)."""
    num_calibration_samples: int = 512
    """Windows of the text to calibrate with, drawn at random; fewer if it is short."""
    max_seq_length: int = 2048
    """Tokens per window, at most the model's context."""
    batch_size: int = 8
    """Windows per batch."""
    text: Path | None = None
    """A UTF-8 text file, in place of a dataset."""
    dataset: Literal["pydoc", "wikitext2", "c4", "ptb"] | None = None
    """A named text (pydoc, which needs no network)."""
    seed: int = 0
    """Of the choice of windows, and of AutoRound's minibatches."""
    resume: Path | None = None
    """Folder in which finished blocks are kept, so that a killed run continues."""
    overwrite: bool = False
    """Replace OUTPUT, if qjax wrote it."""


def recipe_of(options: Options) -> tuple[Any, ...]:
    """The steps that the options describe.

    Raises:
      ValueError: an option that the method does not have, or a value out of range.
    """
    for name, methods in OPTIONS.items():
        if getattr(options, name) is not None and options.method not in methods:
            raise ValueError(
                f"--{name.replace('_', '-')} is an option of {' and '.join(methods)}, "
                f"not of {options.method}"
            )
    patterns: dict[str, Any] = {
        "targets": options.targets or None,
        "ignore": options.ignore,
    }
    name = options.scheme or SCHEMES[options.method]
    damping = 0.01 if options.dampening_frac is None else options.dampening_frac
    if options.method == "gptq":
        return (GPTQ(scheme=name, damping=damping, **patterns),)
    if options.method == "awq":
        duo = {"true": True, "false": False}.get(options.duo_scaling or "true", "both")
        return AWQ(duo_scaling=duo, **patterns), RTN(scheme=name, **patterns)
    if options.method == "smoothquant":
        strength = options.smoothing_strength
        return (
            SmoothQuant(0.8 if strength is None else strength, **patterns),
            GPTQ(scheme=name, damping=damping, **patterns),
        )
    if options.method == "autoround":
        iters = 200 if options.iters is None else options.iters
        return (AutoRound(name, iters=iters, **patterns),)
    return (SimplePTQ(scheme=name, **patterns),)


def calibration(options: Options, model: Model) -> list[tuple[np.ndarray]]:
    """Batches of windows of the text, drawn without replacement.

    Raises:
      ValueError: the model has no tokenizer, or the text is too short for one window.
    """
    if model.tokenizer is None:
        raise ValueError(f"{model.name} has no tokenizer to read the text with")
    text = TextOptions(text=options.text, dataset=options.dataset).load()
    context = getattr(model.config, "context", None) or options.max_seq_length
    length = min(options.max_seq_length, context)
    rows = windows(encode_text(model.tokenizer, text), length).tokens
    count = min(options.num_calibration_samples, len(rows))
    if count < 1 or options.batch_size < 1:
        raise ValueError(
            f"--num-calibration-samples is {options.num_calibration_samples} and "
            f"--batch-size {options.batch_size}: both must be at least 1"
        )
    drawn = np.random.default_rng(options.seed).choice(len(rows), count, replace=False)
    rows = rows[np.sort(drawn)]
    print(f"calibrating with {count} windows of {length} tokens of {text.name}")
    size = options.batch_size
    return [(rows[i : i + size],) for i in range(0, count, size)]


def run(options: Options) -> None:
    """Quantize, save, and print what became of each weight."""
    recipe = recipe_of(options)
    check_target(options.output, options.overwrite, "--overwrite")
    model = open_model(options.model, scan_layers=False, lazy=True, in_float=True)
    data = any(needs_data(step) for step in steps_of(recipe))
    params, report = quantize_with_report(
        model.f,
        model.params,
        recipe,
        calibration(options, model) if data else None,
        example=None if data else model.example,
        resume=options.resume if data else None,
        key=jax.random.key(options.seed),
    )
    shell = {file.name: file for p in SHELL for file in model.folder.glob(p)}
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "report.jsonl"
        report.write(rows)
        save(
            options.output,
            params,
            recipe=recipe,
            metadata={"model": model.name, "scan_layers": False, "seed": options.seed},
            files={**shell, rows.name: rows},
            overwrite=options.overwrite,
        )
    console = wide_console()
    console.print(report.table())
    for note in report.notes:
        console.print(f"note: {note}")
    console.print(f"wrote {options.output}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done, 1 an error, 2 wrong usage."""
    options = tyro.cli(Options, args=arguments, description=__doc__)
    try:
        run(options)
    except (ValueError, TypeError, OSError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        print(f"error: {lines[0]}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
