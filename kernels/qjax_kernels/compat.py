"""The names of Pallas that changed, or may change, between releases of JAX.

Supported: JAX 0.10.2 to 0.11.x. What is known of a TPU generation comes from Pallas,
so that no table of ours can contradict it.
"""

from inspect import signature
from typing import Any

from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

GENERATIONS = {
    "v5e": pltpu.ChipVersion.TPU_V5E,
    "v5p": pltpu.ChipVersion.TPU_V5P,
    "v6e": pltpu.ChipVersion.TPU_V6E,
    "v7x": pltpu.ChipVersion.TPU_7X,
}
KINDS = {
    "TPU v5e": "v5e",
    "TPU v5 lite": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6e": "v6e",
    "TPU v6 lite": "v6e",
    "TPU7x": "v7x",
}


def generation_of(device: Any) -> str | None:
    """Of a TPU or a GPU, by the name that kernels know it by; None if they do not."""
    if device.platform == "gpu":
        return "hopper" if device.compute_capability == "9.0" else None
    return KINDS.get(device.device_kind)


def chip(generation: str) -> Any:
    """What Pallas knows of one TensorCore of a generation: rates, VMEM, native types.

    Raises:
      ValueError: unknown generation.
    """
    if generation not in GENERATIONS:
        raise ValueError(
            f"TPU generation is {generation!r}; it must be one of {list(GENERATIONS)}"
        )
    return pltpu.get_tpu_info_for_chip(GENERATIONS[generation], 1)


def interpret_params() -> Any:
    """The strictest simulation: races are found, memory starts as NaN.

    A read beyond an array is an error.
    """
    return pltpu.InterpretParams(
        detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise"
    )


def races_found() -> bool:
    """Whether the last simulated kernel had a race.

    Raises:
      RuntimeError: none was simulated with race detection.
    """
    if interpret_pallas_call.races is None:
        raise RuntimeError("no kernel was simulated with race detection")
    return interpret_pallas_call.races.races_found


def load(ref: Any, layout: Any) -> Any:
    """A reference's values in registers of a GPU, in a layout."""
    # JAX 0.10 wants an index; from 0.11 on one is deprecated.
    index = signature(plgpu.load).parameters["idx"]
    where = ((),) if index.default is index.empty else ()
    return plgpu.load(ref, *where, layout=layout)
