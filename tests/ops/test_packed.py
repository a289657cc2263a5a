"""Packing for hardware changes no value, and what it is for runs on it."""

from types import SimpleNamespace

import chex
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.core.coded import encode
from qjax.core.formats import Codebook, Int, block, channel, group, token
from qjax.core.layout import Layout
from qjax.core.qtensor import Activation, QTensor, SiteActs
from qjax.ops import Target, embed, matmul
from qjax.ops.kernels import choices
from qjax.ops.packed import Packed
from qjax_kernels.compat import generation_of

K, N, M = 256, 64, 3
HOPPER, GPU, CPU = Target("gpu", "hopper"), Target("gpu"), Target("cpu")


def quantized(format, activation=None, roles="kn", shape=(K, N)):
    acts = () if activation is None else (SiteActs(activation=Activation(activation)),)
    w = jax.random.normal(jax.random.key(0), shape) + 0.1
    sizes = tuple(0 if role == "b" else size for role, size in zip(roles, shape))
    layout = Layout(roles, sizes)
    return QTensor.of(encode(layout.to_matrix(w), format), layout, jnp.bfloat16, acts)


FORMATS = [
    (Int(4, group(64), symmetric=False), None, HOPPER),
    (Int(3, group(32), zero="float"), None, HOPPER),
    (Int(2, channel(), symmetric=False), None, HOPPER),
    (Int(8, group(128), symmetric=False), None, HOPPER),
    (Int(4, group(64), symmetric=False), None, GPU),
    (Int(4, channel(), symmetric=False), Int(8, token()), CPU),
    (Int(8), Int(8, token(), symmetric=False), CPU),
    (Int(8), Int(8, token()), HOPPER),
]


@pytest.mark.parametrize(("format", "activation", "target"), FORMATS)
def test_unpacking_gives_back_what_was_packed(format, activation, target):
    q = {"w": quantized(format, activation, "bkn", (2, K, N)), "other": jnp.ones(3)}
    packed = qjax.pack(q, target)
    (part,) = packed["w"].parts
    assert isinstance(part, Packed) and packed["w"].shape == (2, K, N)
    chex.assert_trees_all_equal(qjax.unpack(packed), q)
    chex.assert_trees_all_equal(packed["w"].dequantize(), q["w"].dequantize())
    chex.assert_trees_all_equal(packed["w"][1].dequantize(), q["w"][1].dequantize())
    chex.assert_trees_all_equal(qjax.pack(packed, target), packed)


def test_packing_adds_no_bytes_to_whole_tiles():
    q = quantized(Int(4, group(64)))
    assert qjax.pack(q, HOPPER).nbytes == q.nbytes


@pytest.mark.parametrize(("format", "activation", "target"), FORMATS[5:])
@pytest.mark.parametrize("M", [1, 3, 8])
def test_a_packed_weight_gives_the_same_integers(format, activation, target, M):
    q = quantized(format, activation)
    x = jax.random.normal(jax.random.key(1), (M, K))
    expected = matmul(x, q, target=GPU)  # as many tokens as there are
    for leaf in (q, qjax.pack(q, target)):
        np.testing.assert_array_equal(matmul(x, leaf, target=target), expected)


def test_hopper_runs_what_is_packed_and_says_what_is_not():
    q, x = quantized(Int(4, group(64))), jnp.ones((M, K), jnp.bfloat16)
    (plain,) = choices(q, 0, x, "auto", HOPPER)
    assert plain.name == "xla" and "qjax.pack(qparams)" in plain.refused
    with pytest.raises(ValueError, match="is not packed for Hopper"):
        matmul(x, q, implementation="pallas", target=HOPPER)
    packed = qjax.pack(q, HOPPER)
    (choice,) = choices(packed, 0, x, "auto", HOPPER)
    assert choice.name == "pallas hopper"
    (elsewhere,) = choices(packed, 0, x, "auto", CPU)
    assert "packed in tiles, for other hardware" in elsewhere.refused


@pytest.mark.parametrize(
    ("format", "target", "why"),
    [
        (Codebook("nf4"), HOPPER, "no kernel for"),
        (Int(5, group(64)), HOPPER, "no kernel for int5 g64"),
        (Int(4, block(64, 64)), HOPPER, "scales for single outputs"),
        (Int(4, group(16)), HOPPER, "group is 16"),
        (Int(4, group(64)), GPU, "no kernel for this GPU"),
        (Int(4, group(64)), Target("gpu", "hopper", 2), "use shard_map"),
    ],
)
def test_a_refusal_on_a_gpu_says_why(format, target, why):
    q = qjax.pack(quantized(format), target)
    (choice,) = choices(q, 0, jnp.ones((M, K), jnp.bfloat16), "auto", target)
    assert choice.implementation == "xla" and why in choice.refused


@pytest.mark.parametrize(
    ("capability", "runs"),
    [("7.5", "narrow"), ("8.0", "narrow"), ("9.0", "hopper"), ("10.0", "narrow")],
)
def test_a_gpu_without_a_kernel_runs_the_xla_form(capability, runs):
    """Ampere, what is older, and what is newer than Hopper."""
    name = {"narrow": "xla, narrow weights", "hopper": "pallas hopper"}[runs]
    card = SimpleNamespace(platform="gpu", compute_capability=capability)
    target = Target("gpu", generation_of(card))
    q = qjax.pack(quantized(Int(4, group(64))), target)
    (choice,) = choices(q, 0, jnp.ones((M, K), jnp.bfloat16), "auto", target)
    assert choice.name == name


def test_other_activations_are_refused_on_hopper():
    q = quantized(Int(4, group(64)), Int(8, group(64)))
    assert qjax.pack(q, HOPPER).parts[0] is q.parts[0]
    (choice,) = choices(q, 0, jnp.ones((M, K), jnp.bfloat16), "auto", HOPPER)
    assert "takes float activations" in choice.refused
    packed = qjax.pack(quantized(Int(4)), HOPPER)
    (choice,) = choices(packed, 0, jnp.ones((M, K)), "auto", HOPPER)
    assert "the activation is float32" in choice.refused


@pytest.mark.parametrize(
    "format",
    [Int(4, group(64), symmetric=False), Int(4, zero="float"), Int(8, group(128))],
    ids=lambda format: format.name,
)
def test_narrow_weights_agree_with_float64(format):
    """The form that XLA gets on a GPU, run where the tests are."""
    q = qjax.pack(quantized(format), GPU)
    x = jax.random.normal(jax.random.key(1), (M, K))
    (choice,) = choices(q, 0, x, "auto", GPU)
    assert choice.name == "xla, narrow weights"
    exact = np.asarray(x, np.float64) @ np.asarray(q.core(jnp.float32), np.float64)
    y, pull = jax.vjp(lambda x: matmul(x, q, target=GPU), x)
    np.testing.assert_allclose(y, exact, rtol=1e-4, atol=1e-3)
    expected = jnp.ones_like(y) @ q.core(jnp.float32).T
    np.testing.assert_allclose(
        pull(jnp.ones_like(y))[0], expected, rtol=1e-4, atol=1e-3
    )


@pytest.mark.parametrize("symmetric", [True, False])
def test_groups_meet_coded_tokens_on_a_gpu(symmetric):
    """One product with scales on the weights, for a loop over groups of integers."""
    q = quantized(Int(4, group(64), symmetric=symmetric), Int(8, token()))
    x = jax.random.normal(jax.random.key(1), (M, K))
    packed = qjax.pack(q, HOPPER)
    (choice,) = choices(packed, 0, x, "auto", HOPPER)
    assert choice.name == "xla, narrow weights"
    y = matmul(x, packed, target=HOPPER)
    np.testing.assert_allclose(y, matmul(x, q, target=CPU), rtol=1e-4, atol=1e-3)


def f(params, x):
    return x @ params["w"]


def test_apply_lowers_to_the_kernel_and_to_the_gradient_of_the_values():
    q = {"w": qjax.pack(quantized(Int(4, group(64), symmetric=False)), HOPPER)}
    x = jax.random.normal(jax.random.key(1), (M, K), jnp.bfloat16)
    run = qjax.apply(f, target=HOPPER)
    exported = jax.export.export(jax.jit(run), platforms=["cuda"])(q, x)
    assert "mosaic_gpu" in exported.mlir_module()
    # Here, where no kernel runs, the same leaf is decoded.
    plain = qjax.unpack(q)
    chex.assert_trees_all_equal(qjax.apply(f)(q, x), qjax.apply(f)(plain, x))
    seed = jnp.ones((M, N), jnp.bfloat16)
    pull = jax.eval_shape(lambda x: jax.vjp(lambda x: run(q, x), x)[1](seed)[0], x)
    assert pull.shape == x.shape


@pytest.mark.parametrize(
    ("format", "activation", "target", "packed", "stored"),
    [
        (Int(4, group(64)), None, HOPPER, "1x2x8x128xui32", f"{K // 8}x{N}xui32"),
        (Int(4, group(64)), None, GPU, f"{N}x{K}xi4", f"{K // 8}x{N}xui32"),
        (Int(8), Int(8, token()), GPU, f"{N}x{K}xi8", f"{K}x{N}xi8"),
    ],
    ids=["tiles", "narrow", "rows"],
)
def test_nothing_is_packed_in_a_call(format, activation, target, packed, stored):
    """Codes go as they were packed to the product; views of them are its own."""
    q = {"w": qjax.pack(quantized(format, activation), target)}
    x = jax.ShapeDtypeStruct((M, K), jnp.bfloat16)
    run = jax.jit(qjax.apply(f, target=target))
    module = jax.export.export(run, platforms=["cuda"])(q, x).mlir_module()
    takes = [line for line in module.splitlines() if f"tensor<{packed}>" in line]
    allowed = ("func", "call", "convert", "reshape", "transpose", "dot_general")
    assert takes and all(any(word in line for word in allowed) for line in takes)
    made = f"-> tensor<{packed}>"
    assert not any(made in line and "func" not in line for line in takes)
    by_product = target.platform == "gpu" and activation is not None
    assert f"tensor<{stored}>" not in module or by_product  # as XLA sees it turned


def test_packed_leaves_are_looked_up_but_neither_saved_nor_sharded(tmp_path):
    q = quantized(Int(4, group(64)))
    packed = qjax.pack(q, HOPPER)
    ids = jnp.array([3, 0])
    chex.assert_trees_all_equal(embed(ids, packed), embed(ids, q))
    with pytest.raises(TypeError, match=r"leaf w/parts/0 is packed.*qjax\.unpack"):
        qjax.save(tmp_path / "saved", {"w": packed})
    mesh = jax.make_mesh((2,), ("x",))
    with pytest.raises(ValueError, match="a packed leaf cannot be sharded"):
        qjax.shard(packed, jax.P(None, "x"), mesh)
