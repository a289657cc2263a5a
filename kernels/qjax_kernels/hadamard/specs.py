"""Named real shapes: features that are rotated before a projection."""

from dataclasses import dataclass

TOKENS = (1, 16, 64, 256, 2048)


@dataclass(frozen=True)
class Spec:
    """An input of a published model's layers, `K = m 2^k`."""

    model: str
    name: str
    K: int
    m: int


SPECS = (
    Spec("Llama-3-8B", "hidden", 4096, 1),
    Spec("Llama-3-8B", "down", 14336, 28),
    Spec("Llama-3-70B", "hidden", 8192, 1),
    Spec("Llama-3-70B", "down", 28672, 28),
    Spec("Qwen3-4B", "hidden", 2560, 20),
    Spec("Qwen3-4B", "down", 9728, 76),
    Spec("Qwen3-30B-A3B", "expert down", 768, 12),
)
