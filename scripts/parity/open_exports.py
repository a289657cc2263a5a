"""Open what qjax exported with the libraries of this environment, and compare logits.

    python scripts/parity/open_exports.py READER OUT [CASE ...]

READER is `transformers` (with compressed-tensors, bitsandbytes, or optimum and
gptqmodel behind it), `gptqmodel` (its own loader) or `hqq`. Every folder in OUT that
`experiments/formats/run.py export` wrote gets an `opened-READER.json`: how far logits
are from those of `qjax.apply`, or why it was refused, and versions.
"""

import json
import os
import sys
from collections.abc import Callable
from functools import partial
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

import numpy as np
import torch
import transformers
from checkpoints import distances, in_float32, logits, widen
from safetensors.torch import load_file

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
}


def by_transformers(folder: Path, tokens: np.ndarray) -> np.ndarray:
    """Whatever reader transformers has for the format."""
    _unpack_in_float32()
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
    automatic = transformers.AutoModelForCausalLM
    if config["model_type"] == "bert":
        automatic = transformers.AutoModelForMaskedLM
    model = automatic.from_pretrained(folder, **options).eval()
    for module in model.modules():
        # Where the processor has it, 4-bit weights are multiplied in bfloat16.
        module.support_avx512bf16_for_cpu = False
    if half:
        logits(model, tokens)  # decodes
        in_float32(model)
    return logits(widen(model, folder) if sixteen else model, tokens)


def _unpack_in_float32() -> None:
    """Without it, compressed-tensors unpacks 4-bit floats to bfloat16."""
    if find_spec("compressed_tensors") is None:
        return
    from compressed_tensors.compressors.nvfp4 import base, helpers  # noqa: PLC0415

    base.unpack_fp4_from_uint8 = partial(
        helpers.unpack_fp4_from_uint8, dtype=torch.float32
    )


def by_gptqmodel(folder: Path, tokens: np.ndarray) -> np.ndarray:
    """The loader of GPTQModel, with its kernel in plain torch."""
    from gptqmodel import BACKEND, GPTQModel  # noqa: PLC0415

    stored = json.loads((folder / "config.json").read_text())["quantization_config"]
    awq = stored["quant_method"] == "awq"
    backend = BACKEND.TORCH_AWQ if awq else BACKEND.TORCH
    loaded = GPTQModel.load(
        str(folder), device="cpu", backend=backend, dtype=torch.float16
    )
    return logits(widen(loaded.model, folder), tokens)


def by_hqq(folder: Path, tokens: np.ndarray) -> np.ndarray:
    """A float model whose linears take the states of `HQQLinear` in the folder."""
    from hqq.core.quantize import HQQLinear  # noqa: PLC0415

    config = transformers.AutoConfig.from_pretrained(folder)
    del config.quantization_config  # transformers 5.23 refuses it
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    found = load_file(folder / "model.safetensors")
    for name in [key.removesuffix(".W_q") for key in found if key.endswith(".W_q")]:
        keys = [key for key in found if key.startswith(f"{name}.")]
        state = {key.removeprefix(f"{name}."): found.pop(key) for key in keys}
        layer = HQQLinear(None, None, compute_dtype=None, device="cpu")
        layer.load_state_dict(state)
        model.set_submodule(name, layer)
    left = model.load_state_dict(found, strict=False)
    assert not left.unexpected_keys, left
    return logits(model, tokens)


READERS: dict[str, Callable[[Path, np.ndarray], np.ndarray]] = {
    "transformers": by_transformers,
    "gptqmodel": by_gptqmodel,
    "hqq": by_hqq,
}


def report(reader: str, folder: Path) -> dict[str, Any]:
    """What came of it; a refusal is a result."""
    with np.load(folder / "expected.npz") as held:
        tokens, expected = held["tokens"], held["logits"]
    try:
        found = READERS[reader](folder, tokens)
    except Exception as error:
        return {"refused": f"{type(error).__name__}: {error}".strip().splitlines()[0]}
    return distances(found, expected)


def main(reader: str, out: str, *only: str) -> None:
    """Open every folder whose format the reader knows in this environment."""
    torch.set_num_threads(1)
    installed = {d.name.lower(): d.version for d in distributions()}
    versions = {name: installed[name] for name in sorted(REPORTED & installed.keys())}
    for folder in sorted(path.parent for path in Path(out).glob("*/expected.npz")):
        config = json.loads((folder / "config.json").read_text())
        package = READS[reader].get(config["quantization_config"]["quant_method"])
        known = package is not None and find_spec(package) is not None
        if not known or (only and folder.name not in only):
            continue
        found = report(reader, folder)
        text = json.dumps(found | {"versions": versions}, indent=2, sort_keys=True)
        (folder / f"opened-{reader}.json").write_text(text + "\n")
        print(folder.name, found, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
