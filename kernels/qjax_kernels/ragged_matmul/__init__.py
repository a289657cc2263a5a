"""Rows of `x` times the expert that each belongs to, experts in integer codes."""
