"""Eight host devices, no network, repeatable hypothesis, strict promotion."""

import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

import hypothesis
import jax
import pytest

# A first call compiles, so a deadline would measure XLA; random examples would
# make a failure on one machine impossible to see on another.
hypothesis.settings.register_profile(
    "qjax", deadline=None, derandomize=True, database=None
)
hypothesis.settings.load_profile("qjax")


@pytest.fixture
def strict():
    """Strict dtype promotion: an int8 silently multiplied by float32 fails."""
    with jax.numpy_dtype_promotion("strict"):
        yield
