"""Where a QTensor meets an activation."""

from qjax.ops.attention import attend
from qjax.ops.conv import conv
from qjax.ops.embed import embed
from qjax.ops.kernels import Choice, how
from qjax.ops.matmul import matmul
from qjax.ops.narrow import GPU_COMPILER_OPTIONS, GPU_DECODE_OPTIONS
from qjax.ops.packed import pack, unpack
from qjax.ops.ragged import ragged_matmul
from qjax.ops.targets import Target

__all__ = [
    "GPU_COMPILER_OPTIONS",
    "GPU_DECODE_OPTIONS",
    "Choice",
    "Target",
    "attend",
    "conv",
    "embed",
    "how",
    "matmul",
    "pack",
    "ragged_matmul",
    "unpack",
]
