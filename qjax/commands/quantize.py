"""`qjax quantize`: a model in low bits, as a folder that `qjax eval` reads."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import tyro

from qjax import methods
from qjax.catalogue import named
from qjax.commands.calibration import CalibrationOptions
from qjax.commands.compare import quantized_bits
from qjax.commands.inputs import open_model
from qjax.commands.output import wide_console
from qjax.io.checkpoint import check_target, save
from qjax.io.folder import check_link
from qjax.models.coded_cache import KVCache, quantize_cache
from qjax.plots import error_plot
from qjax.quantize import quantize_with_report
from qjax.recipe_files import read_recipe
from qjax.recipes import cache_apart, is_quantizer, needs_data, steps_of

METHODS = {method.__name__.lower(): method for method in methods.METHODS}
# What a Hugging Face folder holds beside its weights: configuration and tokenizer.
SHELL = (
    *("config.json", "generation_config.json", "*token*.json", "*token*.model"),
    *("*token*.txt", "vocab.*", "merges.txt", "*.jinja"),
)


@dataclass(frozen=True)
class Quantize:
    """Quantize a model and save it.

    OUT holds the weights and the configuration and tokenizer of MODEL; it appears when
    all of it is written.
    """

    model: Annotated[str, tyro.conf.Positional]
    """A local Hugging Face folder, a hub id, or "bundled"."""
    out: Annotated[Path, tyro.conf.Positional]
    """The folder to write; it must not exist, unless --overwrite."""
    recipe: str = "RTN"
    """A method (RTN, GPTQ, AWQ, ...) with the options below, a short name
    (hqq-int3-g64), or a YAML file of steps."""
    scheme: str | None = None
    """Formats by llm-compressor's name: W4A16 (default), W8A8, FP8_DYNAMIC, ...
    Beside SmoothQuant, BiasCorrection or CrossLayerEqualization: those of an RTN."""
    bits: int | None = None
    """Bits per code, for HQQ: 1 to 8 (default 4)."""
    group_size: int | None = None
    """Weights that share a scale, for HQQ (default 64)."""
    targets: tuple[str, ...] = ()
    """Patterns: globs on paths, re:..., Linear, Conv, Embedding (all but the head)."""
    ignore: tuple[str, ...] = ()
    """Patterns of the weights to leave in float."""
    kv_cache: Literal["fp8"] | None = None
    """Keys and values in float8, on one scale each for every layer, from calibration
    before the weights are quantized. In a YAML file: the step KVCache, or
    llm-compressor's kv_cache_scheme."""
    scan_layers: bool = True
    """Keep the layers stacked; patterns that take single layers need them apart."""
    overwrite: bool = False
    """Replace OUT, if qjax wrote it."""
    calibration: CalibrationOptions = field(default_factory=CalibrationOptions)

    def run(self) -> None:
        """Quantize, save, and print what became of each weight."""
        recipe = self.make_recipe()
        weights, coded_cache = cache_apart(recipe)
        options, mesh = self.calibration, self.calibration.mesh
        options.check_report()
        devices = mesh.start()
        if mesh.writes:
            check_target(self.out, self.overwrite, "--overwrite")
        # What finds the ranges of keys and values reads all weights at once.
        lazy, scan_layers = not coded_cache, self.scan_layers
        model = open_model(
            self.model, scan_layers=scan_layers, lazy=lazy, in_float=True
        )
        data = any(needs_data(step) for step in steps_of(weights))
        batches = mask_fn = None
        if data or coded_cache:
            batches, mask_fn = options.batches(model)
        f, params = model.f, model.params
        if coded_cache:
            if mask_fn is not None:
                raise ValueError(
                    f"--calibration.cut {options.cut} pads documents, and ranges of "
                    "keys and values would see the padding: take another cut"
                )
            f, params = quantize_cache(f, params, batches or ())
        params, report = quantize_with_report(
            f,
            params,
            weights,
            batches if data else None,
            example=None if data else model.example,
            mask_fn=mask_fn if data else None,
            resume=options.resume if data else None,
            offload=options.offload,
            mesh=devices if data else None,
            progress=mesh.writes,
            key=jax.random.key(options.method_seed),
        )
        if not mesh.writes:
            return
        save(
            self.out,
            params,
            recipe=recipe,
            metadata={"model": model.name, "scan_layers": model.scan_layers},
            files=shell_files(model.folder),
            overwrite=self.overwrite,
        )
        if options.report is not None:
            report.write(options.report)
            error_plot(options.report.with_suffix(".png"), report.sites)
        console = wide_console()
        console.print(report.table())
        for note in report.notes:
            console.print(f"note: {note}")
        console.print(
            f"{quantized_bits(params):.3f} bits per quantized weight; wrote {self.out}"
        )

    def make_recipe(self) -> Any:
        """The steps that the options describe."""
        steps = self._weights()
        if self.kv_cache is None:
            return steps
        return KVCache(), *cache_apart(steps)[0]

    def _weights(self) -> Any:
        """The recipe, or the method that the options describe."""
        patterns = {"targets": self.targets or None, "ignore": self.ignore}
        options = {
            "scheme": self.scheme,
            "bits": self.bits,
            "group_size": self.group_size,
        }
        given = {name: value for name, value in options.items() if value is not None}
        if self.recipe.endswith((".yaml", ".yml")):
            if given or self.targets or self.ignore:
                raise ValueError(
                    f"--recipe {self.recipe} is a file, which names schemes and "
                    "patterns itself; leave out the other options"
                )
            return read_recipe(Path(self.recipe))
        method = METHODS.get(self.recipe.lower())
        if method is None:
            return self._short(patterns, given)
        fields = method.__dataclass_fields__
        if "then" in fields:
            raise ValueError(
                f"--recipe {method.__name__} takes another method in its field `then`: "
                "write both in a YAML file"
            )
        beside = hasattr(method, "transform") or hasattr(method, "repair")
        rounded = ()
        if beside and "scheme" in given and "scheme" not in fields:
            rounded = (methods.RTN(given.pop("scheme"), **patterns),)
        for name in given:
            if name not in fields:
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag} is not an option of {method.__name__}")
        recipe = method(**given, **patterns)
        if rounded:
            return recipe, *rounded
        if not any(is_quantizer(step) for step in steps_of(recipe)):
            raise ValueError(
                f"--recipe {method.__name__} quantizes no weights by itself: add "
                "--scheme, such as W8A8, or write a YAML file of steps"
            )
        return recipe

    def _short(self, patterns: dict[str, Any], given: dict[str, Any]) -> Any:
        if given:
            raise ValueError(
                f"--recipe {self.recipe} is not a method, so it takes no "
                f"{', '.join(given)}: give one of {', '.join(METHODS).upper()}"
            )
        asked = {name: value for name, value in patterns.items() if value}
        return tuple(
            patterned(step, asked) for step in steps_of(named(self.recipe).recipe)
        )


def patterned(step: Any, patterns: dict[str, Any]) -> Any:
    """A step with these patterns; a method that wraps another has that one's."""
    if not patterns:
        return step
    if "then" in step.__dataclass_fields__:
        return replace(step, then=patterned(step.then, patterns))
    return replace(step, **patterns)


def shell_files(folder: Path) -> dict[str, Path]:
    """Configuration and tokenizer of a model's folder, by name.

    Raises:
      ValueError: one is a link to a file outside the model.
    """
    found = {file.name: file for pattern in SHELL for file in folder.glob(pattern)}
    for file in found.values():
        check_link(folder, file)
    return found
