"""One set of tests for every backend of an operation.

A test takes `backend` and runs its operation with `backend.run`: on CPU the TPU kernels
in Pallas' strictest simulation; on a machine with a TPU or a GPU
(`JAX_PLATFORMS=tpu` or `cuda`) the kernels for it, on the hardware.
"""

import importlib
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import pytest
from jax.experimental.pallas import tpu as pltpu

from qjax_kernels.compat import KINDS, interpret_params, races_found

BENCH = Path(__file__).parents[2] / "kernels" / "bench"
SIMULATED = "v5e"  # differs most from a CPU: no bfloat16 arithmetic


@dataclass(frozen=True)
class Backend:
    """One kind of hardware.

    Attributes:
      name: "tpu" or "gpu": kernels are in `qjax_kernels/<op>/pallas_<name>.py`.
      options: what every kernel of it takes beside the operation's own arguments.
    """

    name: str
    options: dict[str, Any]

    def simulating(self, generation: str) -> "Backend":
        """The same on another generation; hardware has its own, and skips the test."""
        if "interpret" not in self.options:
            pytest.skip("hardware has its own generation")
        return replace(self, options={**self.options, "generation": generation})

    def run(self, op: str, *arguments: Any, tpu=None, gpu=None, **both: Any) -> Any:
        """The operation `op`; `tpu` and `gpu` are for one of them, as blocks are."""
        module = importlib.import_module(f"qjax_kernels.{op}.pallas_{self.name}")
        own = (tpu if self.name == "tpu" else gpu) or {}
        return getattr(module, op)(*arguments, **{**self.options, **both, **own})


def backends():
    """Those that this machine has: a CPU simulates a TPU."""
    if jax.default_backend() == "gpu":
        return [Backend("gpu", {})]
    if jax.default_backend() == "tpu":
        generation = KINDS[jax.devices()[0].device_kind]
        return [Backend("tpu", {"generation": generation})]
    options = {"generation": SIMULATED, "interpret": interpret_params()}
    return [Backend("tpu", options)]


@pytest.fixture(params=backends(), ids=lambda backend: backend.name)
def backend(request):
    pltpu.reset_tpu_interpret_mode_state()
    yield request.param
    if "interpret" in request.param.options:
        assert not races_found()


@pytest.fixture
def script(monkeypatch):
    """Imports a program of `kernels/bench` by name, and forgets it after the test."""
    for name in ("LIBTPU_INIT_ARGS", "MOSAIC_GPU_DUMP_TO"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    monkeypatch.syspath_prepend(BENCH)
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if (getattr(sys.modules[name], "__file__", "") or "").startswith(str(BENCH)):
            del sys.modules[name]
