"""Arrays only: number formats, packing, rounding and scales."""
