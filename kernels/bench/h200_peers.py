"""The peers of `h200.py`, in torch: the same arrays, each in its own packing.

A peer that is not installed, that fails, or whose values are wrong is named with its
reason and not timed. Adapters were written from the peers' sources (torch 2.13, gemlite
0.6.0.post2, humming-kernels 0.1.19, bitsandbytes 0.50).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from statistics import median
from typing import Any

import numpy as np
from h200_problem import Problem, error

ROUNDS = 15
LARGEST = 448.0  # of e4m3fn


@dataclass(frozen=True)
class Peer:
    """One way to multiply.

    Attributes:
      module: what must be installed beside torch.
      layer: makes of torch, a problem and a device what takes the tokens.
      bits: of a code.
      error: the largest that rounding explains, as a share of the product's size.
      tokens: of torch and `x`, before time is taken: what the layer takes.
      eight: whether it takes `Problem.eight()`.
      float8: whether codes are those of `Problem.float8`.
    """

    module: str
    layer: Callable[[Any, Problem, str], Callable[..., Any]]
    bits: int = 4
    error: float = 0.01
    tokens: Callable[[Any, Any], tuple[Any, ...]] = lambda torch, x: (x,)
    eight: bool = False
    float8: bool = False


def bfloat16(torch: Any, problem: Problem, device: str) -> Callable[[Any], Any]:
    """torch's own product, cuBLAS."""
    w = decoded(torch, problem, device)
    return lambda x: torch.nn.functional.linear(x, w)


def tinygemm(torch: Any, problem: Problem, device: str) -> Callable[[Any], Any]:
    """`torch.ops.aten._weight_int4pack_mm`."""
    q, scale = arrays(torch, problem, device)
    u = (q.T.contiguous() + 8).to(torch.uint8)
    packed = torch._convert_weight_to_int4pack(u[:, ::2] << 4 | u[:, 1::2], 8)
    both = torch.stack([scale, torch.zeros_like(scale)], -1).bfloat16().contiguous()
    run = torch.ops.aten._weight_int4pack_mm
    return lambda x: run(x, packed, problem.group, both)


def gemlite(torch: Any, problem: Problem, device: str) -> Callable[[Any], Any]:
    """Dropbox's Triton kernels."""
    from gemlite.core import TORCH_TO_DTYPE, GemLiteLinear  # noqa: PLC0415

    q, scale = arrays(torch, problem, device)
    dtype = TORCH_TO_DTYPE[torch.bfloat16]
    layer = GemLiteLinear(
        4,
        group_size=problem.group,
        in_features=problem.K,
        out_features=problem.N,
        input_dtype=dtype,
        output_dtype=dtype,
    )
    u = (q.T.contiguous() + 8).to(torch.uint8)
    flat = scale.T.contiguous().reshape(-1, 1).bfloat16()
    layer.pack(u, flat, torch.full_like(flat, 8), None)
    return layer


def humming(torch: Any, problem: Problem, device: str) -> Callable[[Any], Any]:
    """Kernels compiled for each shape, stream-K; its own choice of tiles."""
    from humming.layer import HummingLayer  # noqa: PLC0415

    layer = HummingLayer(
        shape_n=problem.N,
        shape_k=problem.K,
        weight_config={"dtype": f"uint{problem.bits}", "group_size": problem.group},
        torch_dtype=torch.bfloat16,
    )
    layer.load_from_tensors(humming_tensors(torch, problem))
    layer = layer.to(device)
    layer.transform()
    return layer


def humming_tensors(torch: Any, problem: Problem) -> dict[str, Any]:
    """Codes above zero, LSB first along K, and scales: `[N, K*bits/32]`, `[N, G]`."""
    words = np.ascontiguousarray(problem.words().T).view(np.int32)
    scale = torch.tensor(np.ascontiguousarray(problem.scale().T)).bfloat16()
    return {"weight": torch.tensor(words), "weight_scale": scale}


def bitsandbytes(torch: Any, problem: Problem, device: str) -> Callable[[Any], Any]:
    """NF4 in blocks of 64: other codes of the same bits."""
    import bitsandbytes as bnb  # noqa: PLC0415

    layer = bnb.nn.Linear4bit(
        problem.K,
        problem.N,
        bias=False,
        compute_dtype=torch.bfloat16,
        quant_type="nf4",
    )
    w = decoded(torch, problem, "cpu")
    layer.weight = bnb.nn.Params4bit(w, requires_grad=False, quant_type="nf4")
    return layer.to(device)


def int8_tokens(torch: Any, x: Any) -> tuple[Any, Any]:
    """int8 codes of `x[M, K]` and a scale for each token; at least 32 tokens.

    `torch._int_mm` takes more than 16.
    """
    x = torch.nn.functional.pad(x, (0, 0, 0, max(32 - len(x), 0))).float()
    scale = x.abs().amax(1, keepdim=True).clamp(min=1e-30) / 127.5
    return (x / scale).round().clamp(-128, 127).to(torch.int8), scale


def float8_tokens(torch: Any, x: Any) -> tuple[Any, Any]:
    """e4m3fn codes of `x[M, K]` and a scale for each token."""
    scale = x.float().abs().amax(1, keepdim=True).clamp(min=1e-30) / LARGEST
    codes = (x.float() / scale).clamp(-LARGEST, LARGEST)
    return codes.to(torch.float8_e4m3fn), scale


def int8_product(torch: Any, problem: Problem, device: str) -> Callable[..., Any]:
    """`torch._int_mm`; what `torch.compile` makes of its scales is beside it."""
    q, scale = arrays(torch, problem, device)
    w = q.T.contiguous()

    def product(codes: Any, x_scale: Any) -> Any:
        y = torch._int_mm(codes, w.T)[: problem.M].float()
        return (y * (x_scale[: problem.M] * scale)).bfloat16()

    return product


def float8_product(torch: Any, problem: Problem, device: str) -> Callable[..., Any]:
    """`torch._scaled_mm`, a scale for each token and output."""
    q = torch.tensor(problem.float8().view(np.uint8).T.copy(), device=device)
    w = q.view(torch.float8_e4m3fn)
    scale = torch.tensor(problem.scale(), device=device)

    def product(codes: Any, x_scale: Any) -> Any:
        return torch._scaled_mm(
            codes, w.T, x_scale, scale, out_dtype=torch.bfloat16, use_fast_accum=True
        )

    return product


def int8_layer(torch: Any, problem: Problem, device: str) -> Callable[[Any], Any]:
    """Tokens coded in front of the product."""
    product = int8_product(torch, problem, device)
    return lambda x: product(*int8_tokens(torch, x))


def float8_layer(torch: Any, problem: Problem, device: str) -> Callable[[Any], Any]:
    """Tokens coded in front of the product."""
    product = float8_product(torch, problem, device)
    return lambda x: product(*float8_tokens(torch, x))


def compiled(
    layer: Callable[[Any, Problem, str], Callable[..., Any]],
) -> Callable[[Any, Problem, str], Callable[..., Any]]:
    """The layer, what surrounds its product put into few kernels by `torch.compile`."""

    def made(torch: Any, problem: Problem, device: str) -> Callable[..., Any]:
        return torch.compile(layer(torch, problem, device), dynamic=False)

    return made


PEERS: dict[str, Peer] = {
    "bfloat16, torch": Peer("torch", bfloat16, 16),
    "int4, torch _weight_int4pack_mm": Peer("torch", tinygemm),
    "int4, gemlite": Peer("gemlite", gemlite),
    "int4, humming": Peer("humming", humming),
    "nf4, bitsandbytes": Peer("bitsandbytes", bitsandbytes, error=0.2),
    "int8 x int8, torch _int_mm": Peer(
        "torch", compiled(int8_product), 8, 0.02, int8_tokens, eight=True
    ),
    "float8 x float8, torch _scaled_mm": Peer(
        "torch", float8_product, 8, 0.05, float8_tokens, eight=True, float8=True
    ),
    "W8A8, torch": Peer("torch", compiled(int8_layer), 8, 0.02, eight=True),
    "FP8, torch": Peer(
        "torch", compiled(float8_layer), 8, 0.05, eight=True, float8=True
    ),
}


def arrays(torch: Any, problem: Problem, device: str) -> tuple[Any, Any]:
    """`q[K, N]` and scales `[G, N]` of the problem."""
    both = problem.codes(), problem.scale()
    return tuple(torch.tensor(values, device=device) for values in both)


def decoded(torch: Any, problem: Problem, device: str) -> Any:
    """The weight in bfloat16, `[N, K]`."""
    q, scale = arrays(torch, problem, device)
    w = q.float() * scale.repeat_interleave(problem.group or problem.K, 0)
    return w.bfloat16().T.contiguous()


def absent() -> dict[str, str]:
    """Why peers cannot run here: what is not installed."""
    found = {}
    for name, peer in PEERS.items():
        lacking = [m for m in ("torch", peer.module) if find_spec(m) is None]
        if lacking:
            found[name] = f"{lacking[0]} is not installed"
    return found


def wrong(torch: Any, name: str, problem: Problem, device: str) -> str:
    """What is wrong with a peer's values; empty if nothing is."""
    peer = PEERS[name]
    layer = peer.layer(torch, problem, device)
    x = torch.tensor(problem.tokens(), device=device).bfloat16()
    with torch.inference_mode():
        y = layer(*peer.tokens(torch, x)).float().cpu().numpy()
    found = error(y, problem, peer.float8)
    within = found <= peer.error
    return "" if within else f"values are wrong by {found:.3g} of the product's size"


def timed(name: str, problems: list[Problem], small: Problem) -> Iterator[Any]:
    """Results of one peer, its values checked on a small problem first.

    Raises:
      ValueError: its values are wrong.
    """
    import torch  # noqa: PLC0415

    peer = PEERS[name]
    if complaint := wrong(torch, name, small, "cuda"):
        raise ValueError(complaint)
    for problem in problems:
        seconds = device_seconds(torch, peer, problem)
        yield problem.row(name, seconds, peer.bits, "events")


def device_seconds(torch: Any, peer: Peer, problem: Problem) -> float:
    """Median time of one product, in a CUDA graph over all copies of the weight."""
    x = torch.tensor(problem.tokens(), device="cuda").bfloat16()
    count = problem.copies(peer.bits)
    layers = [peer.layer(torch, problem, "cuda") for _ in range(count)]
    with torch.inference_mode():
        tokens = peer.tokens(torch, x)
        for layer in layers:
            layer(*tokens)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for layer in layers:
                layer(*tokens)
        milliseconds = []
        for _ in range(ROUNDS):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            stop.record()
            torch.cuda.synchronize()
            milliseconds.append(start.elapsed_time(stop))
    return median(milliseconds) / 1e3 / len(layers)
