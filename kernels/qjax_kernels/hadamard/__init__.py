"""The Walsh-Hadamard transform of activations, and their codes."""
