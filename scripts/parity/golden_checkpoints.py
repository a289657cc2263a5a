"""Pack checkpoints that peers wrote into one file for the tests.

    python scripts/random_llama.py --size mini --out BASE
    python scripts/parity/checkpoints_llmcompressor.py BASE THEIRS
    python scripts/parity/checkpoints_autoround.py BASE THEIRS
    python scripts/parity/checkpoints_gptqmodel.py BASE THEIRS
    python scripts/parity/golden_checkpoints.py THEIRS tests/golden/checkpoints.npz

Each of the first three in the environment of its peer. Kept are, under the case's name,
`config.json` and `model.safetensors` byte for byte, the tokens, and the peer's logits.
"""

import sys
from pathlib import Path

import numpy as np

FILES = ("config.json", "model.safetensors")


def main(theirs: str, out: str) -> None:
    """Write the file."""
    made = {}
    for path in sorted(Path(theirs).glob("*/logits.npz")):
        case = path.parent.name
        for name in FILES:
            data = (path.parent / name).read_bytes()
            made[f"{case}/{name}"] = np.frombuffer(data, np.uint8)
        with np.load(path) as held:
            made |= {f"{case}/{key}": held[key] for key in held}
    np.savez_compressed(out, **made)
    print(Path(out).stat().st_size, "bytes,", len(made), "arrays")


if __name__ == "__main__":
    main(*sys.argv[1:])
