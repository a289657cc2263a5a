"""Write tests/golden/presets.json: the preset schemes of compressed-tensors.

Runs where compressed-tensors 0.20.0 is installed:

    python scripts/parity/golden_presets.py tests/golden/presets.json

For each name the arguments of weights and input activations that differ from the
defaults of `QuantizationArgs`.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path

from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES

KINDS = ("weights", "input_activations")


def main(out: Path) -> None:
    """Write the file."""
    presets = {
        name: {
            kind: scheme[kind].model_dump(mode="json", exclude_unset=True)
            for kind in KINDS
            if kind in scheme
        }
        for name, scheme in PRESET_SCHEMES.items()
    }
    lines = [f"  {json.dumps(n)}: {json.dumps(presets[n])}" for n in sorted(presets)]
    stated = json.dumps(version("compressed-tensors"))
    body = ",\n".join(lines)
    out.write_text(
        f'{{\n "version": {stated},\n "presets": {{\n{body}\n }}\n}}\n',
        encoding="utf-8",
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
