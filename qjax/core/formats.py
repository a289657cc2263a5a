"""Every number format and granularity: the one place to import them from."""

from qjax.core.additive import Additive
from qjax.core.codebook import Codebook
from qjax.core.floats import MX, NVFP4, Float
from qjax.core.granularity import Granularity, block, channel, group, tensor, token
from qjax.core.integer import Int
from qjax.core.scales import MSE, AbsMax, Grid, MinMax, Percentile, Search
from qjax.core.signs import Binary, Ternary

Format = Int | Float | MX | NVFP4 | Codebook | Additive | Binary | Ternary

__all__ = [
    "MSE",
    "MX",
    "NVFP4",
    "AbsMax",
    "Additive",
    "Binary",
    "Codebook",
    "Float",
    "Format",
    "Granularity",
    "Grid",
    "Int",
    "MinMax",
    "Percentile",
    "Search",
    "Ternary",
    "block",
    "channel",
    "group",
    "tensor",
    "token",
]
