"""The products that `peers.py` compares: XLA's forms, ours, and other libraries'.

Every case is `x[M, K] @ w[K, N]` at Llama-3-8B's `up`. Where a peer's table has no
sizes of blocks for a shape, two are tried and the faster is kept.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import peer_kernels as peer
from compare import dense, scaled_sums, scaled_weights
from forms.form import Form
from gates.int_matmul import Case

from qjax.core.coded import encode
from qjax.core.layout import Layout
from qjax.core.qtensor import QTensor, SiteActs
from qjax.ops import Target, matmul
from qjax_kernels.int_matmul.blocks import Blocks, tokens_stay

K, N, GROUP = 4096, 14336, 128
NARROW = {4: jnp.int4, 8: jnp.int8}
shape = jax.ShapeDtypeStruct


CASES = (
    *(("v6e", 16), ("v5e", 16), ("v6e", 256), ("v5e", 256), ("v7x", 16)),
    *(("v6e", 2048), ("v7x", 256), ("v5e", 2048), ("v7x", 2048)),
)
"""Generations and tokens, the deciding ones first."""

KINDS = ("w4a16_g128", "w4a8_g128", "w8a8")


def cases(generation: str, M: int) -> tuple[Case, ...]:
    """W4A16 and W4A8 with a scale for 128 inputs, W8A8 with one for an output."""
    return (
        Case(generation, 4, M=M),
        Case(generation, 4, int8=True, M=M),
        Case(generation, 8, None, int8=True, M=M),
    )


def ends(M: int) -> int:
    """Bytes of bfloat16 inputs and outputs."""
    return 2 * M * (K + N)


def by_xla(case: Case) -> Iterator[tuple[str, Form]]:
    """XLA's forms: bfloat16 weights, int4 arrays, and qjax's own two."""
    M, here = case.M, Target("tpu", case.generation)
    form = partial(Form, products=M * K * N, contract=contracted(case))
    x, q = shape((M, K), jnp.bfloat16), shape((K, N), jnp.int4)
    scale, least = shape((K // GROUP, N), jnp.float32), stored(case) + ends(M)
    if case.bits == 4 and not case.int8:
        wide, own = shape((K, N), jnp.bfloat16), 2 * K * N + ends(M)
        yield "bfloat16", form("", dense, (x, wide), own)
        for name, f in (("weights", scaled_weights), ("sums", scaled_sums)):
            yield f"int4 array, scale on {name}", form("", f, (x, q, scale), least)
    leaf, decoded = leaf_of(case), Target("gpu")  # where weights are decoded first
    for name, target in (("sums", here), ("decoded", decoded))[: 1 if case.int8 else 2]:
        f = partial(product, implementation="xla", target=target)
        yield f"qjax, {name}", form("", f, (x, leaf), least)


def ours(case: Case) -> Form:
    """The kernel."""
    program, leaf = case.program(), leaf_of(case)
    f = partial(product, implementation="pallas", target=Target("tpu", case.generation))
    if case.bits == 8:  # which the op leaves to XLA
        f, leaf = program.function, case.weight
    blocks = program.config["blocks"]
    block = blocks["m"], blocks["n"], blocks["k"]
    x = shape((case.M, K), jnp.bfloat16)
    stay = case.int8 or tokens_stay(Blocks(**blocks), case.weight)
    return kernel_form(case, f, (x, leaf), program.kernel, block, stay)


def product(x: Any, leaf: QTensor, *, implementation: str, target: Target) -> Any:
    """The op."""
    return matmul(x, leaf, implementation=implementation, target=target)


def peers(case: Case) -> Iterator[tuple[str, Form]]:
    """Other libraries' kernels, with every size of blocks that is tried."""
    generation, M = case.generation, case.M
    sizes, group = (generation, M, K, N), case.group
    tokens, weights = jnp.int8 if case.int8 else None, NARROW[case.bits]
    if case.bits == 4 and not case.int8:
        for lanes in (1, 4):
            block = (*blocks_tried(M)[0], lanes)
            call = peer.tpu_inference_blockwise(*sizes, GROUP, block)
            yield "tpu-inference, blockwise", of_peer(case, call)
    if case.bits == 8:
        # With all inputs in a step it codes tokens once.
        whole = ((512, 512, K),) if M > 256 else ()
        for block in (blocks_tried(M)[1], *whole):
            call = peer.tpu_inference_channel(*sizes, (*block, 1))
            yield "tpu-inference", of_peer(case, call)
    for block in blocks_tried(M)[: 1 if case.int8 else 2]:
        call = peer.tokamax(M, K, N, group, weights, tokens, block)
        yield "tokamax, one group", of_peer(case, call)
    if case.bits == 8 and M % 128 == 0:
        call = peer.qwix(M, K, N, (256, 1024, 512))
        yield "qwix, 128 x 128 tiles", of_peer(case, call)


def blocks_tried(M: int) -> tuple[tuple[int, int, int], ...]:
    """Tokens, outputs and inputs."""
    if M <= 256:
        return (M, 1024, 2048), (M, 512, 4096)
    return (512, 1024, 2048), (1024, 1024, 1024)


def of_peer(case: Case, call: peer.PeerCall) -> Form:
    """The form of a peer's call."""
    return kernel_form(case, call.function, call.arguments, call.kernel, call.block)


def kernel_form(
    case: Case,
    f: Any,
    arguments: Any,
    kernel: str,
    block: tuple[int, int, int],
    stay: bool = False,
) -> Form:
    """A kernel with that block; scales are read beside the weights.

    Tokens are read with every step, or, where a block has all inputs (`stay`, or in one
    step), once.
    """
    m, n, k = block
    by_tokens = (N // n) * (K // k)
    firsts = -(-case.M // m)
    tokens = 2 * m * K / by_tokens if stay or k == K else 2 * m * k
    return Form(
        "", f, arguments, stored(case) + ends(case.M), case.M * K * N,
        kernel, (firsts * by_tokens, stored(case) * n * k / (K * N) + tokens),
        firsts=firsts, contract=contracted(case),
    )  # fmt: skip


def stored(case: Case) -> float:
    """Bytes of codes and float32 scales."""
    return K * N * case.bits / 8 + 4 * N * K / (case.group or K)


def contracted(case: Case) -> str:
    """The type that decides the matrix unit's limit."""
    return "int8" if case.int8 else "bfloat16"


def leaf_of(case: Case) -> Any:
    """The weight as a leaf, shapes only."""
    format, tokens = case.stored
    acts = () if tokens is None else (SiteActs(activation=tokens),)
    layout = Layout("kn", (K, N))
    return jax.eval_shape(
        lambda w: QTensor.of(encode(w, format), layout, jnp.bfloat16, acts),
        shape((K, N), jnp.bfloat16),
    )
