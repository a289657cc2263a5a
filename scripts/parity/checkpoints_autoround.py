"""Let auto-round write checkpoints in the formats of GPTQ, AWQ and its own.

Runs in the environment of `llmcompressor_env.sh`; names choose among the cases:

    python scripts/parity/checkpoints_autoround.py BASE OUT [CASE ...]

Weights are rounded to the nearest, without tuning: the files are what is looked at.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from auto_round import AutoRound
from checkpoints import float_model, keep_logits, tokenizer, write_cases


@dataclass(frozen=True)
class Case:
    """One call of auto-round."""

    format: str
    bits: int
    sym: bool = True
    group_size: int = 32

    def __call__(self, base: str, out: Path) -> None:
        """Quantize, keep the logits of the model with rounded weights, and save."""
        rounding = AutoRound(
            float_model(base),
            tokenizer(base),
            bits=self.bits,
            group_size=self.group_size,
            sym=self.sym,
            iters=0,
            disable_opt_rtn=True,
            device_map="cpu",
            enable_torch_compile=False,
            amp=False,
        )
        model, _ = rounding.quantize()
        keep_logits(out, model, base)
        rounding.save_quantized(str(out), format=self.format)


CASES = {
    "gptq-w4": Case("auto_gptq", 4),
    "gptq-w4_asym": Case("auto_gptq", 4, sym=False),
    "gptq-w2": Case("auto_gptq", 2),
    "gptq-w3": Case("auto_gptq", 3),
    "gptq-w8": Case("auto_gptq", 8),
    "gptq-w4_channel": Case("auto_gptq", 4, group_size=-1),
    "awq-w4": Case("auto_awq", 4),
    "awq-w4_asym": Case("auto_awq", 4, sym=False),
    "own-w4": Case("auto_round", 4),
}


def main(base: str, out: str, *only: str) -> None:
    """Write the cases."""
    cases = {f"autoround-{name}": case for name, case in CASES.items()}
    write_cases(base, out, cases, list(only))


if __name__ == "__main__":
    main(*sys.argv[1:])
