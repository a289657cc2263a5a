"""Decode attention over keys and values in low bits."""

from qjax_kernels.kv_attention.cached import Cached

__all__ = ["Cached"]
