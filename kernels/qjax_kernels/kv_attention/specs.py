"""Named real shapes: `H` query heads on `G` heads of keys and values."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Spec:
    """The attention of a published model, on one device."""

    model: str
    H: int
    G: int
    d: int


SPECS = (
    Spec("Llama-3-8B", 32, 8, 128),
    Spec("Llama-3-70B, one of 8 devices", 8, 1, 128),
    Spec("Qwen3-4B", 32, 8, 128),
    Spec("Qwen3-30B-A3B", 32, 4, 128),
    Spec("Mixtral-8x7B", 32, 8, 128),
)
SLOTS = (1024, 4096, 32768)
SEQUENCES = (1, 16, 64)
