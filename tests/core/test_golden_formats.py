"""Codes, scales and values equal other libraries' on one matrix.

The arrays come from scripts/parity/golden_formats.py (bitsandbytes 0.50.2, torchao
0.18.0, compressed-tensors 0.20.0); matrices are `[out, in]` there.
"""

from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from qjax.core.coded import Coded, encode
from qjax.core.double_quant import dynamic_map
from qjax.core.formats import MX, NVFP4, Codebook, Int, group

GOLDEN = Path(__file__).parents[1] / "golden" / "formats.npz"


@cache
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN) as arrays:
        return dict(arrays)


def coded(w: np.ndarray, format) -> Coded:
    return jax.jit(partial(encode, format=format))(jnp.asarray(w.T))


def not_zero(w: np.ndarray, size: int) -> np.ndarray:
    """Which groups hold more than zeros: the scale of the others is a convention."""
    return np.abs(w).reshape(len(w), -1, size).max(-1) > 0


def float_codes(part: Coded) -> np.ndarray:
    """The elements of a float format, not scaled, `[out, in]`."""
    codes = np.asarray(part.unpack()).T
    if codes.dtype == np.uint8:
        codes = codes.view(ml_dtypes.float4_e2m1fn)
    return codes.astype(np.float32)


def test_dynamic_map_is_bitsandbytes():
    np.testing.assert_array_equal(dynamic_map(), golden()["bnb/dynamic_map"])


@pytest.mark.parametrize("table", ["nf4", "fp4"])
def test_codebooks_are_bitsandbytes(table):
    g = golden()
    part = coded(g[f"{table}/w"], Codebook(table, double_quant=256))
    np.testing.assert_array_equal(part.unpack().T, g[f"{table}/codes"])
    np.testing.assert_array_equal(part.scale.codes.T, g[f"{table}/dq_codes"])
    # The mean of the scales is a sum, whose order is each library's own.
    np.testing.assert_allclose(part.scale.absmax, g[f"{table}/dq_absmax"], rtol=1e-6)
    np.testing.assert_allclose(part.scale.offset, g[f"{table}/dq_offset"][0], rtol=1e-6)
    plain = coded(g[f"{table}/w"], Codebook(table))
    np.testing.assert_array_equal(plain.scale.T, g[f"{table}/absmax"])


@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("int4", Int(4, group(64))),
        ("int3", Int(3, group(32))),
        ("int4_asym", Int(4, group(64), symmetric=False)),
        ("int8_asym", Int(8, group(128), symmetric=False)),
    ],
)
def test_integers_are_compressed_tensors(name, format):
    g = golden()
    part = coded(g["w"], format)
    codes = np.asarray(part.unpack()).T.astype(np.int32) - format.half
    np.testing.assert_array_equal(part.scale.T, g[f"{name}/scale"])
    # The zero point of an all-zero group is 0/0 there; it decodes to zeros in both.
    size = format.granularity.rows
    kept = not_zero(g["w"], size) | format.symmetric
    each = np.repeat(kept, size, axis=1)
    np.testing.assert_array_equal(codes[each], g[f"{name}/codes"][each])
    if not format.symmetric:
        zero = np.asarray(part.grid().zero).T.astype(np.int32) - format.half
        np.testing.assert_array_equal(zero[kept], g[f"{name}/zero"][kept])


def test_mxfp4_ct_rule_is_compressed_tensors():
    g = golden()
    part = coded(g["w"], MX("fp4", scale_rule="ct"))
    kept = not_zero(g["w"], 32)
    scale = np.asarray(part.scale.astype(jnp.float32)).T
    np.testing.assert_array_equal(scale[kept], g["ct_mxfp4/scale"][kept])
    np.testing.assert_array_equal(float_codes(part), g["ct_mxfp4/codes"])


def test_nvfp4_is_compressed_tensors():
    g = golden()
    part = coded(g["w"], NVFP4())
    kept = not_zero(g["w"], 16)
    scale = np.asarray(part.scale.astype(jnp.float32)).T
    np.testing.assert_array_equal(scale[kept], g["ct_nvfp4/scale"][kept])
    np.testing.assert_array_equal(part.global_scale[0], g["ct_nvfp4/global_scale"])
    np.testing.assert_array_equal(float_codes(part), g["ct_nvfp4/codes"])


@pytest.mark.parametrize(
    ("name", "element"),
    [("mxfp4", "fp4"), ("mxfp8", "fp8_e4m3"), ("mxfp8_e5m2", "fp8_e5m2")],
)
def test_mx_ocp_rule_is_torchao(name, element):
    g = golden()
    part = coded(g["w"], MX(element))
    kept = not_zero(g["w"], 32)
    stored = np.asarray(part.scale).view(np.uint8).T
    np.testing.assert_array_equal(stored[kept], g[f"ao_{name}/scale"][kept])
    np.testing.assert_array_equal(float_codes(part), g[f"ao_{name}/values"])


def test_nvfp4_elements_are_torchao():
    g = golden()
    part = coded(g["w"], NVFP4())
    scale = np.asarray(part.scale.astype(jnp.float32)).T
    # torchao keeps block scales at 2^-6 and above, and multiplies by reciprocals.
    normal = g["ao_nvfp4/scale"] > 2.0**-6
    np.testing.assert_array_equal(scale[normal], g["ao_nvfp4/scale"][normal])
    elements = np.repeat(normal, 16, axis=1)
    np.testing.assert_array_equal(
        float_codes(part)[elements], g["ao_nvfp4/values"][elements]
    )
