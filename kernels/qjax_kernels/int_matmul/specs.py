"""Named real shapes, `x[M, K] @ w[K, N]`: what tests and benchmarks run."""

from dataclasses import dataclass

TOKENS = (1, 8, 16, 64, 256, 2048)
"""Decoding alone and in batches, speculative decoding, prefill."""


@dataclass(frozen=True)
class Spec:
    """One projection of a published model."""

    model: str
    name: str
    K: int
    N: int


SPECS = (
    Spec("Llama-3-8B", "qkv", 4096, 6144),
    Spec("Llama-3-8B", "o", 4096, 4096),
    Spec("Llama-3-8B", "up", 4096, 14336),
    Spec("Llama-3-8B", "down", 14336, 4096),
    Spec("Llama-3-70B", "qkv", 8192, 10240),
    Spec("Llama-3-70B", "o", 8192, 8192),
    Spec("Llama-3-70B", "up", 8192, 28672),
    Spec("Llama-3-70B", "down", 28672, 8192),
    Spec("Qwen3-4B", "up", 2560, 9728),
    Spec("Qwen3-4B", "down", 9728, 2560),
    Spec("Qwen3-32B", "up", 5120, 25600),
    Spec("Qwen3-32B", "down", 25600, 5120),
    Spec("Mixtral-8x7B", "expert up", 4096, 14336),
    Spec("Mixtral-8x7B", "expert down", 14336, 4096),
)
