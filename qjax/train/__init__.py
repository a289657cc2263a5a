"""Training: quantization-aware, and of adapters beside quantized weights."""

from qjax.train.binaryconnect import BinaryConnect
from qjax.train.bitnet import BitNet
from qjax.train.dorefa import DoReFa, DoReFaGradients
from qjax.train.finish import finalize
from qjax.train.initialise import initialise_lora
from qjax.train.llm_qat import distillation_loss, generated_rows
from qjax.train.lora import Adapters, LoRA, lora, merge_lora
from qjax.train.lsq import LSQ
from qjax.train.lsq_plus import LSQPlus
from qjax.train.named import quantize_kv, quantize_named
from qjax.train.observed import Observed
from qjax.train.pact import PACT
from qjax.train.paretoq import ParetoQ
from qjax.train.peft import save_peft
from qjax.train.pissa import PiSSA
from qjax.train.qat import fake_quantize
from qjax.train.scales import scales_of, with_scales
from qjax.train.state import QAT, QState
from qjax.train.straight_through import StraightThrough
from qjax.train.xnor import XNOR

__all__ = [
    "LSQ",
    "PACT",
    "QAT",
    "XNOR",
    "Adapters",
    "BinaryConnect",
    "BitNet",
    "DoReFa",
    "DoReFaGradients",
    "LSQPlus",
    "LoRA",
    "Observed",
    "ParetoQ",
    "PiSSA",
    "QState",
    "StraightThrough",
    "distillation_loss",
    "fake_quantize",
    "finalize",
    "generated_rows",
    "initialise_lora",
    "lora",
    "merge_lora",
    "quantize_kv",
    "quantize_named",
    "save_peft",
    "scales_of",
    "with_scales",
]
