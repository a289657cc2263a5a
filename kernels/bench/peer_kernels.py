"""Public Pallas kernels for TPUs, called on the shapes that `peers.py` compares.

    pip install --no-deps --target .venv/peers -r kernels/bench/peers.txt

None of their code is here. tpu-inference is imported without its server, which would
start vLLM; sizes of blocks come from its own table where that has the shape.
"""

import importlib
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from qjax_kernels.compat import KINDS

shape = jax.ShapeDtypeStruct
PRECISION = jax.lax.Precision.DEFAULT
VERSIONS = {"v5e": 5, "v6e": 6, "v7x": 7}


@dataclass(frozen=True)
class PeerCall:
    """One call of a peer's kernel.

    Attributes:
      function: of `arguments`.
      arguments: shapes.
      kernel: what its schedule is named after; empty for the only kernel there is.
      block: tokens, outputs and inputs of one step.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    kernel: str
    block: tuple[int, int, int]


@contextmanager
def on(generation: str) -> Iterator[None]:
    """Trace as on that hardware, for which some peers ask JAX."""
    kind = next(k for k, name in KINDS.items() if name == generation)
    device = AbstractDevice(device_kind=kind, num_cores=1, platform="tpu")
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        yield


def tpu_inference(name: str, generation: str) -> ModuleType:
    """A module of its quantized_matmul, which reads its table for the generation."""
    if "tpu_inference.logger" not in sys.modules:
        package, logger = ModuleType("tpu_inference"), ModuleType("logger")
        spec = find_spec("tpu_inference")
        assert spec is not None and spec.submodule_search_locations is not None
        package.__path__ = list(spec.submodule_search_locations)
        logger.init_logger = _Logger  # pyright: ignore[reportAttributeAccessIssue]
        sys.modules["tpu_inference"] = package
        sys.modules["tpu_inference.logger"] = logger
    room = "tpu_inference.kernels.quantized_matmul"
    sizes = importlib.import_module(f"{room}.tuned_block_sizes")
    sizes.get_tpu_version = partial(VERSIONS.__getitem__, generation)
    return importlib.import_module(f"{room}.{name}")


class _Logger(logging.Logger):
    """What its own logger adds to Python's."""

    warning_once = info_once = logging.Logger.warning


def tpu_inference_blockwise(
    generation: str, M: int, K: int, N: int, group: int, block: Any
) -> PeerCall:
    """Its dense kernel with a scale for every group: 4 bits, tokens as they are."""
    module = tpu_inference("blockwise_kernel", generation)
    tuned = module.TunedValue(*block)

    def run(x: Any, w: Any, scale: Any) -> Any:
        return module.quantized_matmul_kernel(
            x, w, scale, block_size=group, tuned_value=tuned
        )

    given = (
        shape((M, K), jnp.bfloat16),
        shape((N, K), jnp.int4),
        shape((K // group, 1, N), jnp.float32),
    )
    return PeerCall(run, given, "quantized_matmul", block[:3])


def tpu_inference_channel(
    generation: str, M: int, K: int, N: int, block: Any
) -> PeerCall:
    """Its dense kernel with int8 weights and tokens, a scale for every output."""
    module = tpu_inference("kernel", generation)
    sizes = sys.modules["tpu_inference.kernels.quantized_matmul.tuned_block_sizes"]
    key = sizes.get_key(M, N, K, "int8", "int8")
    tuned = sizes.TUNED_BLOCK_SIZES.get(key) or module.TunedValue(*block)

    def run(x: Any, w: Any, scale: Any) -> Any:
        return module.quantized_matmul_kernel(
            x, w, scale, x_q_dtype=jnp.int8, tuned_value=tuned
        )

    given = (
        shape((M, K), jnp.bfloat16),
        shape((N, K), jnp.int8),
        shape((N,), jnp.float32),
    )
    return PeerCall(run, given, "quantized_matmul", tuple(tuned)[:3])


def tokamax(
    M: int, K: int, N: int, group: int | None, weights: Any, tokens: Any, block: Any
) -> PeerCall:
    """Its grouped product with one group, and tokens quantized in the kernel."""
    module = importlib.import_module(
        "tokamax._src.ops.ragged_dot.pallas_mosaic_tpu_kernel"
    )
    m, n, k = block

    def run(x: Any, codes: Any, scale: Any) -> Any:
        return module.gmm(
            x,
            module.QArray(codes, scale),
            jnp.array([M], jnp.int32),
            precision=PRECISION,
            out_dtype=jnp.bfloat16,
            tiling=(m, k, n),
            lhs_qdtype=tokens,
        )

    given = (
        shape((M, K), jnp.bfloat16),
        shape((1, K, N), weights),
        shape((1, K // (group or K), N), jnp.float32),
    )
    return PeerCall(run, given, "gmm_megablox", (m, n, k))


def qwix(M: int, K: int, N: int, block: Any) -> PeerCall:
    """Its kernel that quantizes tokens: int8, one scale for every 128 x 128 weights."""
    module = importlib.import_module("qwix.contrib.kernels.lhs_fused_quantized_matmul")
    m, n, k = block

    def run(x: Any, w: Any, scale: Any) -> Any:
        return module.lhs_fused_quantized_matmul(
            x, w, scale, bm=m, bk=k, bn=n, sm=max(M // 128, 1)
        )

    given = (
        shape((M, K), jnp.float32),  # it refuses bfloat16
        shape((K, N), jnp.int8),
        shape((K // 128, N // 128), jnp.float32),
    )
    return PeerCall(run, given, "-run.", (m, n, k))
