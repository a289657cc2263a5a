"""Pack checkpoints that peers wrote into one file for the tests.

    python scripts/random_llama.py --size mini --out BASE
    python scripts/parity/checkpoints_llmcompressor.py BASE THEIRS
    python scripts/parity/checkpoints_autoround.py BASE THEIRS
    python scripts/parity/checkpoints_gptqmodel.py BASE THEIRS
    python scripts/parity/golden_checkpoints.py THEIRS tests/golden/checkpoints.npz

Each peer in its own environment. Kept are those cases named below: `config.json` and
`model.safetensors` byte for byte, the tokens, and the peer's logits.
"""

import sys
from pathlib import Path

import numpy as np

FILES = ("config.json", "model.safetensors")
CASES = (
    *("llmcompressor-w3", "llmcompressor-w4_asym", "llmcompressor-w4_gptq"),
    *("llmcompressor-w8a8", "llmcompressor-fp8", "llmcompressor-fp8_dynamic"),
    *("llmcompressor-nvfp4", "llmcompressor-mxfp4", "llmcompressor-mixed"),
    *("autoround-gptq-w2", "autoround-gptq-w4_asym", "autoround-awq-w4_asym"),
    *("autoround-own-w4", "gptqmodel-w3", "gptqmodel-w4_asym", "gptqmodel-w4_desc_act"),
)


def main(theirs: str, out: str) -> None:
    """Write the file."""
    made = {}
    for case in CASES:
        folder = Path(theirs) / case
        for name in FILES:
            data = (folder / name).read_bytes()
            made[f"{case}/{name}"] = np.frombuffer(data, np.uint8)
        with np.load(folder / "logits.npz") as held:
            made |= {f"{case}/{key}": held[key] for key in held}
    np.savez_compressed(out, **made)
    print(Path(out).stat().st_size, "bytes,", len(made), "arrays")


if __name__ == "__main__":
    main(*sys.argv[1:])
