"""Let GPTQModel write checkpoints, with the logits of its own model.

Runs in the environment of `gptqmodel_env.sh`; names choose among the cases:

    python scripts/parity/checkpoints_gptqmodel.py BASE OUT [CASE ...]

GPTQModel leaves a folder `logs` where it runs.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
# Its compiled kernel fails where zero points are not symmetric; plain torch does not.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import torch
from checkpoints import calibration, keep_logits, tokenizer, widen, write_cases
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig


@dataclass(frozen=True)
class Case:
    """One call of GPTQModel."""

    bits: int
    sym: bool = True
    desc_act: bool = False
    format: str = "gptq"

    def __call__(self, base: str, out: Path) -> None:
        """Quantize, save, and keep the logits of what was saved, loaded again."""
        settings = QuantizeConfig(
            bits=self.bits,
            group_size=32,
            sym=self.sym,
            desc_act=self.desc_act,
            format=self.format,
            device="cpu",
            offload_to_disk=False,
        )
        tokenizer(base).save_pretrained(base)
        model = GPTQModel.load(base, settings)
        rows = [
            {"input_ids": row.tolist(), "attention_mask": [1] * len(row)}
            for row in calibration(base)
        ]
        model.quantize(rows, batch_size=1)
        model.save(str(out))
        again = GPTQModel.load(
            str(out), device="cpu", backend=BACKEND.TORCH, dtype=torch.float16
        )
        keep_logits(out, widen(again.model, out), base)


CASES = {
    "w4": Case(4),
    "w4_desc_act": Case(4, desc_act=True),
    "w4_asym": Case(4, sym=False, format="gptq_v2"),
    "w2": Case(2),
    "w3": Case(3),
    "w8": Case(8),
}


def main(base: str, out: str, *only: str) -> None:
    """Write the cases."""
    cases = {f"gptqmodel-{name}": case for name, case in CASES.items()}
    write_cases(base, out, cases, list(only))


if __name__ == "__main__":
    main(*sys.argv[1:])
