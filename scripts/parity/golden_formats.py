"""Write tests/golden/formats.npz: what other libraries make of one matrix.

Needs torch 2.13.0 (CPU), bitsandbytes 0.50.2, torchao 0.18.0 and compressed-tensors
0.20.0, which no other script needs; then

    python scripts/parity/golden_formats.py tests/golden/formats.npz

Matrices are stored as torch has them, `[out, in]`.
"""

import sys

import bitsandbytes.functional as bnb
import numpy as np
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import quantize
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from torchao.prototype.mx_formats.kernels import f4_unpacked_to_f32, unpack_uint4
from torchao.prototype.mx_formats.mx_tensor import to_mx
from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize

OUT, IN = 80, 256


def weights() -> np.ndarray:
    rng = np.random.default_rng(20)
    rows = np.exp(rng.normal(size=(OUT, 1)))
    w = (rng.normal(size=(OUT, IN)) * rows).astype(np.float32)
    w[0, :64] = 0
    w[1, 64:128] *= 1e-3
    w[2, 7] = 40
    return w


def bitsandbytes_4bit(w: torch.Tensor, table: str) -> dict[str, torch.Tensor]:
    levels = bnb.get_4bit_type(table, device="cpu")
    order = torch.sort(levels)[0]
    ties = w.clone()
    ties[3, :15], ties[3, 15:64] = (order[1:] + order[:-1]) / 2, 1
    packed, state = bnb.quantize_4bit(ties, quant_type=table, blocksize=64)
    _, nested = bnb.quantize_4bit(
        ties, quant_type=table, blocksize=64, compress_statistics=True
    )
    codes = torch.stack([packed.ravel() >> 4, packed.ravel() & 15], -1)
    return {
        "w": ties,
        "codes": codes.reshape(OUT, IN).to(torch.uint8),
        "absmax": state.absmax.reshape(OUT, IN // 64),
        "dq_codes": nested.absmax.reshape(OUT, IN // 64),
        "dq_absmax": nested.state2.absmax,
        "dq_offset": nested.offset.reshape(1),
    }


def compressed_tensors(w: torch.Tensor, size: int, **args) -> dict[str, torch.Tensor]:
    made = QuantizationArgs(strategy="group", group_size=size, **args)
    return _quantized(w, size, made)


def _quantized(w, size, args, global_scale=None) -> dict[str, torch.Tensor]:
    groups = w.reshape(OUT, -1, size)
    scale, zero = calculate_qparams(
        groups.amin(-1), groups.amax(-1), args, global_scale
    )
    codes = quantize(w, scale, zero, args, global_scale=global_scale)
    made = {"scale": scale.float(), "codes": codes.float()}
    return made if args.symmetric else {**made, "zero": zero.to(torch.int8)}


def ct_float4(w: torch.Tensor, kind: str) -> dict[str, torch.Tensor]:
    if kind == "mxfp4":
        args = QuantizationArgs(
            num_bits=4, type="float", strategy="group", group_size=32,
            scale_dtype=torch.uint8,
        )  # fmt: skip
        return _quantized(w, 32, args)
    args = QuantizationArgs(
        num_bits=4, type="float", strategy="tensor_group", group_size=16,
        scale_dtype=torch.float8_e4m3fn,
    )  # fmt: skip
    total = generate_gparam(w.amin(), w.amax())
    return {**_quantized(w, 16, args, total), "global_scale": total}


def torchao_mx(w: torch.Tensor, element) -> dict[str, torch.Tensor]:
    scale, data = to_mx(w, element, 32)
    if data.dtype == torch.uint8:
        data = f4_unpacked_to_f32(unpack_uint4(data)).reshape(OUT, IN)
    return {"scale": scale.view(torch.uint8), "values": data.float()}


def torchao_nvfp4(w: torch.Tensor) -> dict[str, torch.Tensor]:
    total = w.abs().amax() / (448 * 6)
    scale, data = nvfp4_quantize(w, 16, total)
    values = f4_unpacked_to_f32(unpack_uint4(data)).reshape(OUT, IN)
    return {"scale": scale.float(), "values": values}


def main(path: str) -> None:
    w = torch.from_numpy(weights())
    made = {
        "nf4": bitsandbytes_4bit(w, "nf4"),
        "fp4": bitsandbytes_4bit(w, "fp4"),
        "bnb": {"dynamic_map": bnb.create_dynamic_map()},
        "int4": compressed_tensors(w, 64, num_bits=4, symmetric=True),
        "int3": compressed_tensors(w, 32, num_bits=3, symmetric=True),
        "int4_asym": compressed_tensors(w, 64, num_bits=4, symmetric=False),
        "int8_asym": compressed_tensors(w, 128, num_bits=8, symmetric=False),
        "ct_mxfp4": ct_float4(w, "mxfp4"),
        "ct_nvfp4": ct_float4(w, "nvfp4"),
        "ao_mxfp4": torchao_mx(w, torch.float4_e2m1fn_x2),
        "ao_mxfp8": torchao_mx(w, torch.float8_e4m3fn),
        "ao_mxfp8_e5m2": torchao_mx(w, torch.float8_e5m2),
        "ao_nvfp4": torchao_nvfp4(w),
    }
    flat = {f"{a}/{b}": x.numpy() for a, d in made.items() for b, x in d.items()}
    np.savez_compressed(path, w=w.numpy(), **flat)


if __name__ == "__main__":
    main(sys.argv[1])
