"""Let bitsandbytes and hqq write checkpoints, with the logits of their own models.

Both run in the test environment (`pip install -e ".[parity]"`); names choose cases:

    python scripts/parity/checkpoints_more.py BASE OUT [CASE ...]
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from checkpoints import exact_int8, float_model, keep_logits, write_cases
from hqq.core.quantize import BaseQuantizeConfig
from hqq.models.hf.base import AutoHQQHFModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig


@dataclass(frozen=True)
class BitsAndBytes:
    """Quantized by transformers while it loads."""

    settings: dict[str, Any]

    def __call__(self, base: str, out: Path) -> None:
        """Quantize, keep the logits, and save."""
        exact_int8()
        model = AutoModelForCausalLM.from_pretrained(
            base,
            dtype=torch.float32,
            quantization_config=BitsAndBytesConfig(**self.settings),
        ).eval()
        for module in model.modules():
            # Where the processor has it, 4-bit weights are multiplied in bfloat16.
            module.support_avx512bf16_for_cpu = False
        keep_logits(out, model, base)
        model.save_pretrained(out)


def hqq(bits: int, base: str, out: Path) -> None:
    """Quantize, save, and keep the logits."""
    model = float_model(base)
    # Its files cannot hold a tensor twice.
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    model.config.tie_word_embeddings = False
    settings = BaseQuantizeConfig(nbits=bits, group_size=32, axis=1)
    AutoHQQHFModel.quantize_model(
        model, settings, compute_dtype=torch.float32, device="cpu"
    )
    AutoHQQHFModel.save_to_safetensors(model, str(out), verbose=False)
    keep_logits(out, model, base)


FOUR = {"load_in_4bit": True}
CASES = {
    "bitsandbytes-nf4": BitsAndBytes({**FOUR, "bnb_4bit_quant_type": "nf4"}),
    "bitsandbytes-nf4_double": BitsAndBytes(
        {**FOUR, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    ),
    "bitsandbytes-fp4": BitsAndBytes({**FOUR, "bnb_4bit_quant_type": "fp4"}),
    "bitsandbytes-int8": BitsAndBytes({"load_in_8bit": True}),
    **{f"hqq-w{bits}": partial(hqq, bits) for bits in (1, 2, 3, 4, 8)},
}


def main(base: str, out: str, *only: str) -> None:
    """Write the cases."""
    write_cases(base, out, CASES, list(only))


if __name__ == "__main__":
    main(*sys.argv[1:])
