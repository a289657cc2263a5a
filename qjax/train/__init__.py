"""Training: quantization-aware, and of adapters beside quantized weights."""

from qjax.train.binaryconnect import BinaryConnect
from qjax.train.bitnet import BitNet
from qjax.train.dorefa import DoReFa
from qjax.train.finish import finalize
from qjax.train.lsq import LSQ
from qjax.train.lsq_plus import LSQPlus
from qjax.train.observed import Observed
from qjax.train.pact import PACT
from qjax.train.paretoq import ParetoQ
from qjax.train.qat import fake_quantize
from qjax.train.state import QAT, QState
from qjax.train.straight_through import StraightThrough
from qjax.train.xnor import XNOR

__all__ = [
    "LSQ",
    "PACT",
    "QAT",
    "XNOR",
    "BinaryConnect",
    "BitNet",
    "DoReFa",
    "LSQPlus",
    "Observed",
    "ParetoQ",
    "QState",
    "StraightThrough",
    "fake_quantize",
    "finalize",
]
