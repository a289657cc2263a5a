"""The registry: a method is in it by being imported here."""

from qjax.methods.autoround import AutoRound
from qjax.methods.awq import AWQ
from qjax.methods.bias_correction import BiasCorrection
from qjax.methods.brecq import BRECQ
from qjax.methods.cross_layer import CrossLayerEqualization
from qjax.methods.eetq import EETQ
from qjax.methods.efficientqat import EfficientQAT
from qjax.methods.gptaq import GPTAQ
from qjax.methods.gptq import GPTQ
from qjax.methods.hqq import HQQ
from qjax.methods.imatrix import IMatrix
from qjax.methods.llm_int8 import LLMInt8
from qjax.methods.loftq import LoftQ
from qjax.methods.lorc import LoRC
from qjax.methods.lplr import LPLR
from qjax.methods.lqer import LQER
from qjax.methods.omniquant import OmniQuant
from qjax.methods.qep import QEP
from qjax.methods.qera import QERA
from qjax.methods.rptq import RPTQ
from qjax.methods.rtn import RTN
from qjax.methods.sequential_mse import SequentialMSE
from qjax.methods.simple_ptq import SimplePTQ
from qjax.methods.smoothquant import SmoothQuant
from qjax.methods.svdquant import SVDQuant
from qjax.methods.zeroquant import ZeroQuant
from qjax.methods.zeroquant_lkd import ZeroQuantLKD

METHODS = (
    RTN,
    HQQ,
    IMatrix,
    SequentialMSE,
    GPTQ,
    GPTAQ,
    QEP,
    AWQ,
    SmoothQuant,
    SimplePTQ,
    EETQ,
    LLMInt8,
    ZeroQuant,
    RPTQ,
    AutoRound,
    BRECQ,
    OmniQuant,
    EfficientQAT,
    ZeroQuantLKD,
    LoftQ,
    LPLR,
    SVDQuant,
    LoRC,
    LQER,
    QERA,
    BiasCorrection,
    CrossLayerEqualization,
)

__all__ = [
    "AWQ",
    "BRECQ",
    "EETQ",
    "GPTAQ",
    "GPTQ",
    "HQQ",
    "LPLR",
    "LQER",
    "METHODS",
    "QEP",
    "QERA",
    "RPTQ",
    "RTN",
    "AutoRound",
    "BiasCorrection",
    "CrossLayerEqualization",
    "EfficientQAT",
    "IMatrix",
    "LLMInt8",
    "LoRC",
    "LoftQ",
    "OmniQuant",
    "SVDQuant",
    "SequentialMSE",
    "SimplePTQ",
    "SmoothQuant",
    "ZeroQuant",
    "ZeroQuantLKD",
]
