"""The peers of `h200.py`, in torch: the same arrays, each in its own packing.

A peer that is not installed, or fails, is named with its reason and not timed.
"""

from collections.abc import Callable
from importlib.util import find_spec
from statistics import median
from typing import Any

Prepare = Callable[[Any, Any], Callable[[Any], Any]]
ROUNDS = 15
NO_ADAPTER = {"humming": "no adapter: its interface was not known here"}


def bfloat16(torch: Any, problem: Any) -> Callable[[Any], Any]:
    """torch's own product, cuBLAS."""
    w = decoded(torch, problem)
    return lambda x: torch.nn.functional.linear(x, w)


def tinygemm(torch: Any, problem: Any) -> Callable[[Any], Any]:
    """`torch.ops.aten._weight_int4pack_mm`."""
    q, scale = arrays(torch, problem)
    u = (q.T.contiguous() + 8).to(torch.uint8)
    packed = torch._convert_weight_to_int4pack(u[:, ::2] << 4 | u[:, 1::2], 8)
    both = torch.stack([scale, torch.zeros_like(scale)], -1).bfloat16().contiguous()
    run = torch.ops.aten._weight_int4pack_mm
    return lambda x: run(x, packed, problem.group, both)


def gemlite(torch: Any, problem: Any) -> Callable[[Any], Any]:
    """Dropbox's Triton kernels."""
    from gemlite.core import TORCH_TO_DTYPE, GemLiteLinear  # noqa: PLC0415

    q, scale = arrays(torch, problem)
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


def bitsandbytes(torch: Any, problem: Any) -> Callable[[Any], Any]:
    """NF4 in blocks of 64: other codes of the same bits."""
    import bitsandbytes as bnb  # noqa: PLC0415

    w = decoded(torch, problem)
    layer = bnb.nn.Linear4bit(
        problem.K,
        problem.N,
        bias=False,
        compute_dtype=torch.bfloat16,
        quant_type="nf4",
    )
    layer.weight = bnb.nn.Params4bit(w.cpu(), requires_grad=False, quant_type="nf4")
    return layer.cuda()


PEERS: dict[str, tuple[str, Prepare, int]] = {
    "bfloat16, torch": ("torch", bfloat16, 16),
    "int4, torch _weight_int4pack_mm": ("torch", tinygemm, 4),
    "int4, gemlite": ("gemlite", gemlite, 4),
    "nf4, bitsandbytes": ("bitsandbytes", bitsandbytes, 4),
}


def arrays(torch: Any, problem: Any) -> tuple[Any, Any]:
    """`q[K, N]` and scales `[G, N]` of the problem, on the card."""
    both = problem.codes(), problem.scale()
    return tuple(torch.tensor(values, device="cuda") for values in both)


def decoded(torch: Any, problem: Any) -> Any:
    """The weight in bfloat16, `[N, K]`."""
    q, scale = arrays(torch, problem)
    w = q.float() * scale.repeat_interleave(problem.group, 0)
    return w.bfloat16().T.contiguous()


def timed(
    problems: list[Any], row: Callable[..., dict[str, Any]], tiny: bool
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Results of every peer that runs, and why the others do not."""
    missing = {
        name: f"{module} is not installed"
        for name, (module, _, _) in PEERS.items()
        if find_spec(module) is None or find_spec("torch") is None
    }
    missing |= {n: why for n, why in NO_ADAPTER.items() if find_spec(n) is not None}
    missing |= {n: "not installed" for n in NO_ADAPTER if find_spec(n) is None}
    there = [name for name in PEERS if name not in missing]
    if tiny or not there:
        return [], missing | dict.fromkeys(there, "not run: no card")
    import torch  # noqa: PLC0415

    rows: list[dict[str, Any]] = []
    for name in there:
        _, prepare, bits = PEERS[name]
        try:
            for problem in problems:
                seconds = device_seconds(torch, prepare, problem, bits)
                size = problem.K * problem.N * bits // 8
                rows.append(row(problem, name, seconds, size))
                print(rows[-1], flush=True)
        except (RuntimeError, TypeError, ValueError, ImportError) as error:
            missing[name] = f"failed: {type(error).__name__}: {error}"
    return rows, missing


def device_seconds(torch: Any, prepare: Prepare, problem: Any, bits: int) -> float:
    """Median time of one product, in a CUDA graph over all copies of the weight."""
    x = torch.tensor(problem.tokens(), device="cuda").bfloat16()
    layers = [prepare(torch, problem) for _ in range(problem.copies(bits))]
    with torch.inference_mode():
        for layer in layers:
            layer(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for layer in layers:
                layer(x)
        milliseconds = []
        for _ in range(ROUNDS):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            stop.record()
            torch.cuda.synchronize()
            milliseconds.append(start.elapsed_time(stop))
    return median(milliseconds) / 1e3 / len(layers)
