"""Named real shapes, `E` experts of `w[K, N]`: what tests and benchmarks run."""

from dataclasses import dataclass

TOKENS = (1, 16, 64, 256, 2048)
"""Each is a row for every expert that it chooses."""


@dataclass(frozen=True)
class Spec:
    """One projection of the experts of a published model."""

    model: str
    name: str
    E: int
    chosen: int
    K: int
    N: int


SPECS = (
    Spec("Mixtral-8x7B", "up", 8, 2, 4096, 14336),
    Spec("Mixtral-8x7B", "down", 8, 2, 14336, 4096),
    Spec("Mixtral-8x22B", "up", 8, 2, 6144, 16384),
    Spec("Qwen3-30B-A3B", "up", 128, 8, 2048, 768),
    Spec("Qwen3-30B-A3B", "down", 128, 8, 768, 2048),
    Spec("Qwen3-235B-A22B", "up", 128, 8, 4096, 1536),
)
