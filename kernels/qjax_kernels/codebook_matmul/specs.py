"""Formats of weights in codebooks, at the shapes of `int_matmul.specs`."""

FORMATS = {
    "nf4": (4, 64),
    "k-means 4": (4, None),
    "k-means 3": (3, None),
    "k-means 2": (2, None),
}
"""Bits and inputs that share a scale (None: all). Double-quantized scales are decoded
before the kernel: one for 64 weights."""
