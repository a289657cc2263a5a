"""Write tests/golden/nvfp4.npz: NVFP4 weights as llm-compressor rounds them.

Runs in the environment of `llmcompressor_env.sh`, on the bundled model and a random
Mixtral, whose folder is kept:

    python scripts/parity/golden_nvfp4.py qjax/models/tiny_llama tests/golden/nvfp4.npz

- `base/*`: the Mixtral, `config.json` and `model.safetensors` byte for byte.
- `<model>/names`: its quantized linears, as the checkpoint names them; `global_scale`:
  the second scale of each; `packed`, `scale`: CRC-32 of the bytes of its codes and of
  its scales.
"""

import json
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from safetensors.torch import load_file

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 32,
}
LAST = "weight_global_scale"


def mixtral(folder: Path) -> None:
    """A random one; members of a fused linear have ranges of their own."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model("mixtral", **SIZES)
    model: Any = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.to(torch.bfloat16).save_pretrained(folder)


def rounded(folder: Path | str, out: Path) -> dict[str, np.ndarray]:
    """What the peer stores of the model in `folder`."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32
    )
    ignore = ["lm_head", "re:.*gate$"]
    recipe = QuantizationModifier(targets="Linear", scheme="NVFP4A16", ignore=ignore)
    oneshot(model=model, recipe=recipe)
    model.save_pretrained(out, save_compressed=True)
    held = load_file(out / "model.safetensors")
    names = sorted(n.removesuffix(f".{LAST}") for n in held if n.endswith(LAST))

    def sums(last: str) -> np.ndarray:
        each = [held[f"{name}.{last}"].view(torch.uint8).numpy() for name in names]
        return np.array([zlib.crc32(x.tobytes()) for x in each], np.uint32)

    return {
        "names": np.array(names),
        "global_scale": torch.cat([held[f"{n}.{LAST}"] for n in names]).numpy(),
        "packed": sums("weight_packed"),
        "scale": sums("weight_scale"),
    }


def main(tiny: str, out: str) -> None:
    """Write the file."""
    torch.set_num_threads(1)
    made: dict[str, np.ndarray] = {}
    with tempfile.TemporaryDirectory() as work:
        base = Path(work, "mixtral")
        mixtral(base)
        for name in ("config.json", "model.safetensors"):
            made[f"base/{name}"] = np.frombuffer((base / name).read_bytes(), np.uint8)
        for kind, folder in (("tiny_llama", tiny), ("mixtral", base)):
            found = rounded(folder, Path(work, f"{kind}-nvfp4"))
            made |= {f"{kind}/{key}": each for key, each in found.items()}
            print(kind, json.dumps(found["names"].tolist()))
    np.savez_compressed(out, **made)
    print(Path(out).stat().st_size, "bytes,", len(made), "arrays")


if __name__ == "__main__":
    main(*sys.argv[1:])
