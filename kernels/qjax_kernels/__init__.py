"""Low-bit kernels in Pallas; imports jax only."""
