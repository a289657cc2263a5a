"""Open what qjax exported with the libraries of this environment, and compare logits.

    python scripts/parity/open_exports.py READER[,READER...] OUT [CASE ...]

READER is `transformers` (with compressed-tensors, bitsandbytes, or optimum and
gptqmodel behind it), `unfused` (the same for models with experts, which become linears
of their own, see unfused.py), `gptqmodel` (its own loader), `hqq`, or `ordered`
(compressed-tensors 0.12.2 for `g_idx`, which newer ones refuse). Every folder in OUT
that `experiments/formats/run.py export` wrote gets an `opened-READER.json`: how far
logits are from those of `qjax.apply`, or why it was refused, and versions. Where those
of a token are further than rounding, inputs and outputs of all linears that code their
inputs go into `linears-READER.npz`. CASE is one of those folders, or one that holds
several.

Readers compute in float32 here. Where a library fixes 16 bits, that line alone is
replaced: the dtype to which compressed-tensors unpacks 4-bit floats, the product (not
the decoding) of GPTQModel's AWQ linear, and bitsandbytes' `6.200124e-5` for `1/127^2`.
Of GPTQModel's kernels the one in plain torch is chosen.
"""

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
# Its compiled kernel fails where zero points are not symmetric; plain torch does not.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import numpy as np
import torch
import transformers
from checkpoints import distances, exact_int8, logits, widen
from safetensors.torch import load_file
from unfused import experts_as_linears, has_experts, with_module_names

REPORTED = {
    *("torch", "transformers", "compressed-tensors", "bitsandbytes", "hqq"),
    *("gptqmodel", "optimum", "auto-round", "llmcompressor"),
}
# What transformers decodes to bfloat16 alone when it runs on a CPU.
HALF = ("mxfp8-quantized",)
# The formats of every reader, and the package that it needs for them.
READS: dict[str, dict[str, str]] = {
    "transformers": {
        **{"compressed-tensors": "compressed_tensors", "bitsandbytes": "bitsandbytes"},
        **{"gptq": "gptqmodel", "awq": "gptqmodel"},
    },
    "gptqmodel": {"gptq": "gptqmodel", "awq": "gptqmodel"},
    "hqq": {"hqq": "hqq"},
    "ordered": {"compressed-tensors": "compressed_tensors"},
}
READS["unfused"] = READS["transformers"]
UNFUSED = ("unfused", "hqq", "ordered")  # have no place for fused experts
ROUNDING = 1e-5  # a difference of logits above it is none of float32's rounding


def by_transformers(folder: Path, tokens: np.ndarray) -> Any:
    """Whatever reader transformers has for the format."""
    _compute_in_float32()
    config = json.loads((folder / "config.json").read_text())
    stored = config["quantization_config"]
    groups = stored.get("config_groups", {}).values()
    half = any(group["format"] in HALF for group in groups)
    sixteen = stored["quant_method"] in ("gptq", "awq")
    narrow = torch.bfloat16 if half else torch.float16
    options: dict[str, Any] = {"dtype": narrow if half or sixteen else torch.float32}
    if any(not group["weights"]["symmetric"] for group in groups):
        # It has no room for packed zero points unless it decodes while loading.
        options["quantization_config"] = transformers.CompressedTensorsConfig(
            dequantize=True
        )
    if stored["quant_method"] == "gptq":
        options["quantization_config"] = transformers.GPTQConfig(
            stored["bits"], backend="gptq_torch"
        )
    if stored["quant_method"] == "awq":
        options["quantization_config"] = transformers.AwqConfig(backend="torch_awq")
    automatic = transformers.AutoModelForCausalLM
    if config["model_type"] == "bert":
        automatic = transformers.AutoModelForMaskedLM
    model = automatic.from_pretrained(folder, **options).eval()
    for module in model.modules():
        # Where the processor has it, 4-bit weights are multiplied in bfloat16.
        module.support_avx512bf16_for_cpu = False
    if half:
        logits(model, tokens)  # decodes
    return widen(model, folder) if half or sixteen else model


def _compute_in_float32() -> None:
    """What no option of the libraries brings to float32, or makes exact."""
    if find_spec("compressed_tensors") is not None:
        from compressed_tensors.compressors.nvfp4 import base, helpers  # noqa: PLC0415

        base.unpack_fp4_from_uint8 = partial(
            helpers.unpack_fp4_from_uint8, dtype=torch.float32
        )
        from compressed_tensors.quantization.lifecycle import forward  # noqa: PLC0415

        if not hasattr(forward, "unchanged"):
            forward.unchanged = forward.compute_dynamic_scales_and_zp
            forward.compute_dynamic_scales_and_zp = _scales_of_tokens
    if find_spec("gptqmodel") is not None:
        from gptqmodel.nn_modules.qlinear import torch_awq  # noqa: PLC0415

        torch_awq.AwqTorchLinear.forward = _awq_forward
    if find_spec("bitsandbytes") is not None:
        exact_int8()


def _scales_of_tokens(value: Any, args: Any, *rest: Any, **more: Any) -> Any:
    """compressed-tensors takes tokens `[M, K]` without a batch to share one scale."""
    from compressed_tensors.quantization.lifecycle import forward  # noqa: PLC0415

    if args.strategy != "token" or value.ndim != 2:
        return forward.unchanged(value, args, *rest, **more)
    found = forward.unchanged(value[None], args, *rest, **more)
    return tuple(None if each is None else each[0] for each in found)


def _awq_forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    """`AwqTorchLinear.forward` in the dtype of its input."""
    from gptqmodel.quantization.awq.utils import packing_utils  # noqa: PLC0415

    weight = packing_utils.dequantize_gemm(
        self.qweight, self.qzeros, self.scales, self.bits, self.group_size
    )
    y = x @ weight.to(x.dtype)
    return y if self.bias is None else y + self.bias.to(x.dtype)


def by_gptqmodel(folder: Path, _: np.ndarray) -> Any:
    """The loader of GPTQModel, with its kernel in plain torch."""
    from gptqmodel import BACKEND, GPTQModel  # noqa: PLC0415

    _compute_in_float32()
    stored = json.loads((folder / "config.json").read_text())["quantization_config"]
    awq = stored["quant_method"] == "awq"
    backend = BACKEND.TORCH_AWQ if awq else BACKEND.TORCH
    loaded = GPTQModel.load(
        str(folder), device="cpu", backend=backend, dtype=torch.float16
    )
    return widen(loaded.model, folder)


def by_hqq(folder: Path, _: np.ndarray) -> Any:
    """A float model whose linears take the states of `HQQLinear` in the folder."""
    from hqq.core.quantize import HQQLinear  # noqa: PLC0415

    config = transformers.AutoConfig.from_pretrained(folder)
    model = _float_model(config)  # transformers 5.23 refuses the quantized one
    found = load_file(folder / "model.safetensors")
    for name in [key.removesuffix(".W_q") for key in found if key.endswith(".W_q")]:
        keys = [key for key in found if key.startswith(f"{name}.")]
        state = {key.removeprefix(f"{name}."): found.pop(key) for key in keys}
        layer = HQQLinear(None, None, compute_dtype=None, device="cpu")
        layer.load_state_dict(state)
        model.set_submodule(name, layer)
    left = model.load_state_dict(found, strict=False)
    assert not left.unexpected_keys, left
    return model


def _float_model(config: Any) -> Any:
    """The model of a configuration without quantization, its parameters random."""
    del config.quantization_config
    automatic = transformers.AutoModelForCausalLM
    if config.model_type == "bert":
        automatic = transformers.AutoModelForMaskedLM
    return automatic.from_config(config).float().eval()


def by_ordered(folder: Path, _: np.ndarray) -> Any:
    """A float model of what compressed-tensors up to 0.18 makes of `weight_g_idx`.

    Release 0.12.2 comes first in `PYTHONPATH`, from `pip install --no-deps --target`.
    """
    from compressed_tensors.compressors import (  # noqa: PLC0415
        PackedQuantizationCompressor,
    )
    from compressed_tensors.quantization import QuantizationArgs  # noqa: PLC0415

    config = transformers.AutoConfig.from_pretrained(folder)
    (scheme,) = config.quantization_config["config_groups"].values()
    newer = ("scale_dtype", "zp_dtype")
    said = {k: v for k, v in scheme["weights"].items() if k not in newer}
    arguments = QuantizationArgs(**said)
    assert arguments.actorder == "group"
    model = _float_model(config)
    found = load_file(folder / "model.safetensors")
    last = ".weight_packed"
    for name in [key.removesuffix(last) for key in found if key.endswith(last)]:
        keys = [key for key in found if key.startswith(f"{name}.weight_")]
        held = {key.removeprefix(f"{name}."): found.pop(key) for key in keys}
        found[f"{name}.weight"] = PackedQuantizationCompressor().decompress_weight(
            held, arguments
        )
    left = model.load_state_dict(found, strict=False)
    assert not left.unexpected_keys, left
    return model


READERS: dict[str, Callable[[Path, np.ndarray], Any]] = {
    "transformers": by_transformers,
    "gptqmodel": by_gptqmodel,
    "hqq": by_hqq,
    "ordered": by_ordered,
    "unfused": by_transformers,
}


def report(reader: str, folder: Path) -> dict[str, Any]:
    """What came of it; a refusal is a result."""
    with np.load(folder / "expected.npz") as held:
        tokens, expected = held["tokens"], held["logits"]
    renamed = reader in UNFUSED and has_experts(folder)
    copy = Path(tempfile.mkdtemp()) / "renamed"
    source = with_module_names(folder, copy) if renamed else folder
    try:
        model = READERS[reader](source, tokens)
        found, linears = observed(model, tokens)
    except Exception as error:
        return {"refused": f"{type(error).__name__}: {error}".strip().splitlines()[0]}
    finally:
        shutil.rmtree(copy.parent)
    report = distances(found, expected)
    if report["worst"] > ROUNDING and linears:
        np.savez(folder / f"linears-{reader}.npz", **linears)
    return report


def observed(
    model: Any, tokens: np.ndarray
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Logits; and `NAME.x[M, K]`, `NAME.y[M, N]` of linears that code their inputs.

    `y` is without the bias.
    """
    held: dict[str, np.ndarray] = {}

    def keep(name: str, layer: Any, inputs: Any, output: Any) -> None:
        bias = 0 if layer.bias is None else layer.bias
        x, y = inputs[0].float(), (output - bias).float()
        if name.endswith((".w1", ".w2", ".w3")):  # Mixtral's, in its checkpoints
            name = name.replace(".mlp.", ".block_sparse_moe.")
        held[f"{name}.x"] = x.reshape(-1, x.shape[-1]).numpy()
        held[f"{name}.y"] = y.reshape(-1, y.shape[-1]).numpy()

    for name, module in model.named_modules():
        scheme = getattr(module, "quantization_scheme", None)
        coded = scheme is not None and scheme.input_activations is not None
        if isinstance(module, torch.nn.Linear) and (
            coded or type(module).__name__ == "Linear8bitLt"
        ):
            module.register_forward_hook(partial(keep, name))
    return logits(model, tokens), held


def main(readers: str, out: str, *only: str) -> None:
    """Open every folder whose format the readers know in this environment."""
    torch.set_num_threads(1)
    for reader in readers.split(","):
        apart = experts_as_linears() if reader in UNFUSED else nullcontext()
        with apart:
            read(reader, out, only)


def read(reader: str, out: str, only: tuple[str, ...]) -> None:
    """Those that this reader has not opened yet."""
    installed = {d.name.lower(): d.version for d in distributions()}
    versions = {name: installed[name] for name in sorted(REPORTED & installed.keys())}
    for folder in sorted(path.parent for path in Path(out).glob("*/*/expected.npz")):
        config = json.loads((folder / "config.json").read_text())
        package = READS[reader].get(config["quantization_config"]["quant_method"])
        known = package is not None and find_spec(package) is not None
        chosen = not only or bool({folder.name, folder.parent.name} & set(only))
        if not known or not chosen or (folder / f"opened-{reader}.json").exists():
            continue
        if reader == "unfused" and not has_experts(folder):
            continue
        found = report(reader, folder)
        text = json.dumps(found | {"versions": versions}, indent=2, sort_keys=True)
        (folder / f"opened-{reader}.json").write_text(text + "\n")
        print(folder.parent.name, folder.name, found, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
