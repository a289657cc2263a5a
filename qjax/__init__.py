"""Quantization as JAX transforms.

>>> import jax.numpy as jnp, qjax
>>> def f(params, x):
...     return jnp.tanh(x @ params["up"]) @ params["down"]
>>> params = {"up": jnp.ones((64, 128)), "down": jnp.ones((128, 64))}
>>> x = jnp.ones((2, 64))
>>> qparams = qjax.quantize(f, params, qjax.RTN("W4A16"), [(x,)], progress=False)
>>> qjax.apply(f)(qparams, x).shape
(2, 64)
"""

from qjax.allocate import MixedPrecision
from qjax.core.formats import (
    MX,
    NVFP4,
    Binary,
    Codebook,
    Float,
    Int,
    Ternary,
    block,
    channel,
    group,
    tensor,
    token,
)
from qjax.core.histogram import Histogram, Quantile
from qjax.core.lazy import LazyLeaf
from qjax.core.qtensor import Activation, QTensor, Stacked, dequantize, is_quantized
from qjax.core.ranges import (
    KLRange,
    MinMaxRange,
    MovingAverageRange,
    MSERange,
    PercentileRange,
)
from qjax.core.reservoir import Reservoir
from qjax.core.sharding import partition_specs, shard
from qjax.core.statistics import (
    AbsMaximum,
    Cross,
    Hessian,
    Mean,
    MeanAbs,
    MovingRange,
    Range,
    SecondMoment,
)
from qjax.io.checkpoint import restore, save
from qjax.io.export import export
from qjax.io.huggingface import load_model
from qjax.methods import (
    AWQ,
    BRECQ,
    EETQ,
    GPTAQ,
    GPTQ,
    HQQ,
    QEP,
    RPTQ,
    RTN,
    AutoRound,
    BiasCorrection,
    CrossLayerEqualization,
    EfficientQAT,
    IMatrix,
    LLMInt8,
    OmniQuant,
    SequentialMSE,
    SimplePTQ,
    SmoothQuant,
    ZeroQuant,
    ZeroQuantLKD,
)
from qjax.models.coded_cache import quantize_cache
from qjax.models.functional import functional
from qjax.observe import observe
from qjax.on_the_fly import load_quantized
from qjax.ops import GPU_COMPILER_OPTIONS, GPU_DECODE_OPTIONS, Target, pack, unpack
from qjax.quantize import quantize, quantize_with_report
from qjax.recipe_files import read_recipe, write_recipe
from qjax.schemes import scheme
from qjax.trace import QuantizationWarning, Site, Sites, apply, explain, sites
from qjax.train import (
    LQER,
    LSQ,
    PACT,
    QAT,
    QERA,
    XNOR,
    BinaryConnect,
    BitNet,
    DoReFa,
    DoReFaGradients,
    LoftQ,
    LSQPlus,
    Observed,
    ParetoQ,
    PiSSA,
    StraightThrough,
    fake_quantize,
    finalize,
    initialise_lora,
    lora,
    merge_lora,
    save_peft,
)
from qjax.zeroquant_search import search_zeroquant

__version__ = "0.1.0"

__all__ = [
    "AWQ",
    "BRECQ",
    "EETQ",
    "GPTAQ",
    "GPTQ",
    "GPU_COMPILER_OPTIONS",
    "GPU_DECODE_OPTIONS",
    "HQQ",
    "LQER",
    "LSQ",
    "MX",
    "NVFP4",
    "PACT",
    "QAT",
    "QEP",
    "QERA",
    "RPTQ",
    "RTN",
    "XNOR",
    "AbsMaximum",
    "Activation",
    "AutoRound",
    "BiasCorrection",
    "Binary",
    "BinaryConnect",
    "BitNet",
    "Codebook",
    "Cross",
    "CrossLayerEqualization",
    "DoReFa",
    "DoReFaGradients",
    "EfficientQAT",
    "Float",
    "Hessian",
    "Histogram",
    "IMatrix",
    "Int",
    "KLRange",
    "LLMInt8",
    "LSQPlus",
    "LazyLeaf",
    "LoftQ",
    "MSERange",
    "Mean",
    "MeanAbs",
    "MinMaxRange",
    "MixedPrecision",
    "MovingAverageRange",
    "MovingRange",
    "Observed",
    "OmniQuant",
    "ParetoQ",
    "PercentileRange",
    "PiSSA",
    "QTensor",
    "Quantile",
    "QuantizationWarning",
    "Range",
    "Reservoir",
    "SecondMoment",
    "SequentialMSE",
    "SimplePTQ",
    "Site",
    "Sites",
    "SmoothQuant",
    "Stacked",
    "StraightThrough",
    "Target",
    "Ternary",
    "ZeroQuant",
    "ZeroQuantLKD",
    "apply",
    "block",
    "channel",
    "dequantize",
    "explain",
    "export",
    "fake_quantize",
    "finalize",
    "functional",
    "group",
    "initialise_lora",
    "is_quantized",
    "load_model",
    "load_quantized",
    "lora",
    "merge_lora",
    "observe",
    "pack",
    "partition_specs",
    "quantize",
    "quantize_cache",
    "quantize_with_report",
    "read_recipe",
    "restore",
    "save",
    "save_peft",
    "scheme",
    "search_zeroquant",
    "shard",
    "sites",
    "tensor",
    "token",
    "unpack",
    "write_recipe",
]
