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
from qjax.core.lazy import LazyLeaf
from qjax.core.qtensor import Activation, QTensor, Stacked, dequantize, is_quantized
from qjax.core.sharding import partition_specs, shard
from qjax.io.checkpoint import restore, save
from qjax.io.huggingface import load_model
from qjax.methods import HQQ, RTN
from qjax.models.functional import functional
from qjax.quantize import quantize, quantize_with_report
from qjax.schemes import scheme
from qjax.trace import QuantizationWarning, Site, Sites, apply, sites

__version__ = "0.1.0"

__all__ = [
    "HQQ",
    "MX",
    "NVFP4",
    "RTN",
    "Activation",
    "Binary",
    "Codebook",
    "Float",
    "Int",
    "LazyLeaf",
    "QTensor",
    "QuantizationWarning",
    "Site",
    "Sites",
    "Stacked",
    "Ternary",
    "apply",
    "block",
    "channel",
    "dequantize",
    "functional",
    "group",
    "is_quantized",
    "load_model",
    "partition_specs",
    "quantize",
    "quantize_with_report",
    "restore",
    "save",
    "scheme",
    "shard",
    "sites",
    "tensor",
    "token",
]
