"""Where a QTensor meets an activation."""

from qjax.ops.attention import attend
from qjax.ops.conv import conv
from qjax.ops.embed import embed
from qjax.ops.matmul import how, matmul
from qjax.ops.ragged import ragged_matmul
from qjax.ops.targets import Target

__all__ = ["Target", "attend", "conv", "embed", "how", "matmul", "ragged_matmul"]
