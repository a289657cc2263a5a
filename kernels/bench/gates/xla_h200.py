"""XLA's forms of one product on an H200: what they write beside the result is gated.

Shapes are those of `up` of Llama-3-8B; 118 MB would be its weight in bfloat16.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from programs import CudaProgram

from qjax import GPU_COMPILER_OPTIONS, GPU_DECODE_OPTIONS, pack
from qjax.core.coded import encode
from qjax.core.formats import Format, Int, group
from qjax.core.layout import Layout
from qjax.core.qtensor import QTensor
from qjax.ops import Target, matmul

GPU = Target("gpu")
K, N = 4096, 14336


@dataclass(frozen=True)
class Case:
    """One product."""

    name: str
    weights: Format
    M: int
    options: tuple[tuple[str, Any], ...] = ()

    def leaf(self) -> QTensor:
        """The weight, from nothing."""
        w = jnp.zeros((K, N), jnp.bfloat16)
        q = QTensor.of(encode(w, self.weights), Layout("kn", (K, N)), w.dtype)
        return pack(q, GPU)

    def program(self) -> CudaProgram:
        """What is compiled."""
        option = {(): "", FUSED: ", fused", SPLIT: ", fused, split"}[self.options]
        return CudaProgram(
            name=f"xla {self.name} {self.M}x{K}x{N}{option}",
            function=partial(matmul, implementation="xla", target=GPU),
            arguments=(
                jax.ShapeDtypeStruct((self.M, K), jnp.bfloat16),
                jax.eval_shape(self.leaf),
            ),
            config={"weights": self.weights.name},
            options=self.options,
        )


FUSED = tuple(GPU_COMPILER_OPTIONS.items())
SPLIT = tuple(GPU_DECODE_OPTIONS.items())
W4, W4_ZERO = Int(4, group(128)), Int(4, group(128), symmetric=False)
GATE = tuple(
    case.program()
    for case in (
        Case("w4a16_g128", W4, 1, options=FUSED),
        Case("w4a16_g128", W4, 16, options=SPLIT),
        Case("w4a16_g128_zero", W4_ZERO, 16, options=SPLIT),
    )
)
