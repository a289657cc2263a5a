"""Write tests/golden/packing.npz: how auto-round packs GPTQ's and AWQ's tensors.

Runs in the environment of `llmcompressor_env.sh`:

    python scripts/parity/golden_packing.py tests/golden/packing.npz

For every case `<format>/<bits>/*`: codes `q[in, out]`, zero points `zero[groups, out]`
(at least 1) and scales `scale[groups, out]`, powers of two so that the peer, which
takes a float weight and rounds it, finds the same codes; and what it packed, `qweight`
and `qzeros`. `gptq` keeps zero points less one (version 1), `gptq_v2` as they are.
"""

import sys
from typing import Any

import numpy as np
import torch
from auto_round.export.export_to_awq.utils import WQLinear_GEMM
from auto_round_extension.torch.qlinear_torch import QuantLinear as Version2
from auto_round_extension.torch.qlinear_torch_zp import QuantLinear as Version1

IN, OUT, GROUP = 128, 96, 32


def case(bits: int, seed: int) -> tuple[dict[str, np.ndarray], torch.nn.Linear]:
    rng = np.random.default_rng(seed)
    q = rng.integers(0, 2**bits, (IN, OUT))
    zero = rng.integers(1, 2**bits, (IN // GROUP, OUT))
    scale = 2.0 ** rng.integers(-6, -3, (IN // GROUP, OUT))
    weight = (q - zero.repeat(GROUP, 0)) * scale.repeat(GROUP, 0)
    linear = torch.nn.Linear(IN, OUT, bias=False)
    linear.weight.data = torch.from_numpy(weight.T.copy()).float()
    arrays = {"q": q.astype(np.uint8), "zero": zero.astype(np.uint8)}
    return arrays | {"scale": scale.astype(np.float32)}, linear


def gptq(kind: Any, bits: int) -> dict[str, np.ndarray]:
    arrays, linear = case(bits, bits)
    packed = kind(bits, GROUP, IN, OUT, False)
    scale, zero = torch.from_numpy(arrays["scale"]), torch.from_numpy(arrays["zero"])
    packed.device = "cpu"
    packed.pack(linear, scale.t(), zero.float().t(), None, "cpu")
    return arrays | {n: getattr(packed, n).numpy() for n in ("qweight", "qzeros")}


def awq() -> dict[str, np.ndarray]:
    arrays, linear = case(4, 0)
    scale, zero = torch.from_numpy(arrays["scale"]), torch.from_numpy(arrays["zero"])
    packed = WQLinear_GEMM.from_linear(
        linear, 4, GROUP, scales=scale, zeros=zero.float(), device="cpu"
    )
    return arrays | {n: getattr(packed, n).numpy() for n in ("qweight", "qzeros")}


def main(path: str) -> None:
    found = {"awq/4": awq()}
    for bits in (2, 3, 4, 8):
        found[f"gptq/{bits}"] = gptq(Version1, bits)
        found[f"gptq_v2/{bits}"] = gptq(Version2, bits)
    flat = {f"{k}/{n}": v for k, each in found.items() for n, v in each.items()}
    np.savez_compressed(path, **flat)


if __name__ == "__main__":
    main(sys.argv[1])
