"""Formats of float weights, at the shapes of `int_matmul.specs`."""

FORMATS = {
    "fp8": ("e4m3", None, False),
    "fp8 w8a8": ("e4m3", None, True),
    "fp8 e5m2": ("e5m2", None, False),
    "fp8 128x128": ("e4m3", 128, False),
    "mxfp8": ("e4m3", 32, False),
    "mxfp4": ("e2m1", 32, False),
    "nvfp4": ("e2m1", 16, False),
}
"""Element, inputs that share a scale (None: all), whether tokens are coded too."""
