"""Coded weights on the kernels of `qjax_kernels`: which can run, and running them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from qjax.core.coded import Coded
from qjax.core.formats import Codebook, Int, token
from qjax.core.qtensor import Activation, QTensor, SiteActs
from qjax.ops.activations import contraction
from qjax.ops.backward_kernels import backward_product, unfit_backward
from qjax.ops.level_kernels import (
    codebook_weight,
    has_levels,
    levels_product,
    unfit_levels,
)
from qjax.ops.narrow import has_narrow
from qjax.ops.packed import TILES, Packed, whole_zeros
from qjax.ops.packed import unfit as unfit_packed
from qjax.ops.sums import has_coded_sums, has_sums
from qjax.ops.targets import Target
from qjax.ops.vectors import has_products
from qjax_kernels import crossing
from qjax_kernels.compat import GENERATIONS, chip
from qjax_kernels.int_matmul import IntWeight, blocks, pallas_gpu
from qjax_kernels.int_matmul.pallas_tpu import int_matmul
from qjax_kernels.sparse_outlier import pallas_tpu as sparse_outlier

IMPLEMENTATIONS = ("auto", "xla", "pallas")
Product = Callable[[Any, SiteActs, Coded], Any]
NOT_PARTITIONED = (
    "{} devices share the program, and a kernel is not partitioned: use shard_map"
)


def check_implementation(implementation: str) -> None:
    """That an implementation is known.

    Raises:
      ValueError: it is not.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation is {implementation!r}; it must be one of {IMPLEMENTATIONS}"
        )


@dataclass(frozen=True)
class Choice:
    """How one coded part of a site runs.

    Attributes:
      implementation: "xla" or "pallas".
      generation: whose kernel; None for XLA.
      refused: why the kernel does not run; empty if it does.
      sums: XLA's form with scales on sums, for TPUs.
      narrow: XLA's form with scales on an array of narrow weights, for GPUs.
      vectors: products of code vectors first, for a few tokens.
      floats: the kernel's int8 tokens meet weights with their scales, in bfloat16.
      tokens: what XLA's form with int8 tokens fills their number up to a multiple of.
    """

    implementation: str
    generation: str | None = None
    refused: str = ""
    sums: bool = False
    narrow: bool = False
    vectors: bool = False
    floats: bool = False
    tokens: int = 1

    @property
    def name(self) -> str:
        """`xla`, the same with the words of its form, or `pallas v5e`."""
        if self.generation is not None:
            return f"{self.implementation} {self.generation}"
        form = ", scales on sums" * self.sums + ", narrow weights" * self.narrow
        return self.implementation + form + ", code vectors first" * self.vectors

    @property
    def meets(self) -> str:
        """In what int8 tokens meet integer weights, in words; empty where in int32."""
        if self.narrow:
            return "as floats"
        return "in bfloat16" if self.floats else ""


def how(q: QTensor, site: int = 0, chosen: tuple[Choice, ...] = ()) -> str:
    """In words, how the site contracts: `int4 g128 x int8 channel in int32`.

    Args:
      q: the leaf.
      site: position among its sites.
      chosen: how each part runs, if known: some hardware meets codes in other types.
    """
    activation = q.site(site).activation
    names = " + ".join(part.format.name for part in q.parts) or "low rank"
    branch = "" if q.left is None or not q.parts else ", low rank beside it in float"
    branch += "" if q.sparse is None else ", outlier weights beside it"
    if activation is None:
        return f"{names}, float activations{branch}"
    ways = [contraction(part.format, activation.format) for part in q.parts]
    accumulator = {"int": "in int32", "float8": "in float8", "values": "as floats"}
    kind = "dynamic" if activation.dynamic else "static"
    words = [accumulator[way] for way in ways]
    for at, choice in enumerate(chosen):
        if ways[at] == "int" and choice.meets:
            words[at] = choice.meets
    into = ", ".join(sorted(set(words)))
    kept = activation.outliers
    beside = "" if kept is None else f", features from {kept:g} on in float"
    return f"{names} x {activation.format.name} {kind} {into}{beside}{branch}"


def choices(
    q: QTensor, site: int, x: Any, implementation: str, target: Target
) -> tuple[Choice, ...]:
    """One choice for each part of `q`.

    Raises:
      ValueError: `implementation` is "pallas" and a part has no kernel.
    """
    if implementation == "xla":
        why = "XLA was asked for"
        return tuple(_by_xla(part, q, site, x, target, why) for part in q.parts)
    found = tuple(choose(q, part, site, x, target) for part in q.parts)
    cannot = [c.refused for c in found if c.implementation == "xla"]
    if implementation == "pallas" and cannot:
        raise ValueError(f'implementation is "pallas", but {cannot[0]}')
    return found


def choose(q: QTensor, part: Coded, site: int, x: Any, target: Target) -> Choice:
    """The implementation of one part, for `x[*batch, M, K]`."""
    why = unfit(q, part, site, x, target)
    if why:
        return _by_xla(part, q, site, x, target, why)
    floats = _floats(q, part, site, x, target.generation)
    return Choice("pallas", target.generation, floats=floats)


def _floats(q: QTensor, part: Coded, site: int, x: Any, generation: str | None) -> bool:
    """Whether a TPU's kernel contracts int8 tokens in bfloat16."""
    activation = q.site(site).activation
    if generation not in GENERATIONS or activation is None or has_levels(part):
        return False
    weight = jax.eval_shape(int_weight, part)
    if activation.outliers is not None:
        return not chip(generation).is_matmul_supported(jnp.int8, jnp.int8)
    found = blocks.choose(generation, x.shape[0], weight, True)
    return blocks.contracted(generation, found, weight, True) != "int8"


def _by_xla(
    part: Coded, q: QTensor, site: int, x: Any, target: Target, why: str
) -> Choice:
    """XLA, in the form that suits the platform."""
    activation = q.site(site).activation
    matrix = x.ndim == 2 and not isinstance(part, Packed)
    return Choice(
        "xla",
        refused=why,
        sums=target.platform == "tpu" and matrix and _sums(part, activation),
        narrow=(
            target.platform == "gpu" and x.ndim == 2 and has_narrow(part, activation)
        ),
        vectors=activation is None and has_products(part, x),
        # A CPU's int8 products are fast for matrices only, not for a few vectors.
        tokens=8 if target.platform == "cpu" else 1,
    )


def _sums(part: Coded, activation: Activation | None) -> bool:
    """Whether the scales of a part can multiply sums, of values or of codes."""
    if activation is None:
        return has_sums(part)
    return has_coded_sums(part, activation)


def unfit(q: QTensor, part: Coded, site: int, x: Any, target: Target) -> str:
    """Why no kernel takes a part; empty if one does."""
    if target.platform == "gpu":
        return _unfit_gpu(q, part, site, x, target)
    if isinstance(part, Packed):
        return f"the weight is packed in {part.order}, for other hardware"
    why = unfit_target(target)
    if why or target.generation is None:
        return why
    if q.lead or x.ndim != 2:
        return "the weight has leading axes"
    if has_levels(part):
        return unfit_levels(part, q.site(site), x, target.generation)
    activation = q.site(site).activation
    return (
        unfit_format(part, (2, 4, 8) if activation else (2, 3, 4, 8))
        or unfit_tokens(x, activation)
        or _unfit_size(q, part, site, x, target.generation)
    )


def _unfit_gpu(q: QTensor, part: Coded, site: int, x: Any, target: Target) -> str:
    """Why no kernel takes a part on a GPU; empty if one does."""
    if target.generation != "hopper":
        return "there is no kernel for this GPU, only for Hopper"
    if target.devices > 1:
        return NOT_PARTITIONED.format(target.devices)
    if q.lead or x.ndim != 2:
        return "the weight has leading axes"
    if q.site(site).activation is not None:
        return "the kernel for Hopper takes float activations"
    why = unfit_packed(part, TILES) or unfit_tokens(x, None)
    if why or (isinstance(part, Packed) and part.order == TILES):
        return why
    return "the weight is not packed for Hopper: qjax.pack(qparams)"


def unfit_target(target: Target) -> str:
    """Why the hardware runs no kernel; empty if it does."""
    if target.platform != "tpu":
        return f"there is no kernel for {target.platform}"
    if target.generation is None:
        return "this generation of TPU has no kernel"
    if target.devices > 1:
        return NOT_PARTITIONED.format(target.devices)
    return ""


def unfit_format(part: Coded, bits: tuple[int, ...] = (2, 4, 8)) -> str:
    """Why no integer kernel takes the format; empty if one of those bits does."""
    format = part.format
    if not isinstance(format, Int) or format.bits not in bits:
        return f"no kernel for {format.name}"
    if format.granularity.cols != 1:
        return f"a kernel has scales for single outputs, not {format.granularity.label}"
    return ""


def unfit_tokens(x: Any, activation: Activation | None) -> str:
    """Why no integer kernel takes the activation; empty if one does."""
    if activation is None:
        if x.dtype != jnp.bfloat16:
            return f"the kernel contracts bfloat16; the activation is {x.dtype.name}"
        return ""
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        return f"the kernel codes bfloat16 and float32, not {x.dtype.name}"
    if activation.outliers is not None:
        return _unfit_kept(x, activation)
    if activation != Activation(Int(8, token())):
        return f"the kernel codes int8 tokens, not {activation.format.name}"
    return ""


def _unfit_kept(x: Any, activation: Activation) -> str:
    """Codes are found before this kernel: any symmetric int8 of whole tokens suits."""
    if x.dtype != jnp.bfloat16:
        return (
            f"the kernel keeps outliers in bfloat16; the activation is {x.dtype.name}"
        )
    format = activation.format
    if isinstance(format, Int) and format.symmetric and format.granularity.rows is None:
        return ""
    return f"the kernel with outliers takes int8 tokens, not {format.name}"


def _unfit_size(q: QTensor, part: Coded, site: int, x: Any, generation: str) -> str:
    weight = jax.eval_shape(int_weight, part)
    activation = q.site(site).activation
    coded = activation is not None
    if coded and activation.outliers is not None:
        return sparse_outlier.too_large(generation, x.shape[0], weight)
    why = crossing.unfit(weight) or blocks.left_to_xla(
        generation, x.shape[0], weight, coded
    )
    if why:
        return why
    chosen = blocks.choose(generation, x.shape[0], weight, coded)
    return blocks.too_large(generation, chosen, weight, coded)


def int_weight(part: Coded) -> IntWeight:
    """The part as the kernels take it: its own codes and scales, nothing repacked."""
    format = part.format
    assert isinstance(format, Int)
    zero = None
    if format.zero == "int":
        zero = whole_zeros(part)
    elif format.zero == "float":
        zero = part.zero.astype(jnp.float32) - format.half
    rows = format.granularity.rows
    return IntWeight(part.codes, part.scale, zero, format.bits, rows, part.shape[0])


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def kernel_product(
    x: Any, acts: SiteActs, part: Coded, dtype: Any, generation: str, values: Product
) -> Any:
    """`x` times the part on a kernel; the gradient is that of `values`.

    The gradient by `x` is a kernel's too where one is there. Forward-mode derivatives
    are XLA's alone.
    """
    if isinstance(part, Packed):
        return pallas_gpu.int_matmul(x, part.tiles(), dtype=dtype)
    if has_levels(part):
        return levels_product(x, acts, part, dtype, generation)
    return int_matmul(
        x,
        int_weight(part),
        generation=generation,
        int8_tokens=acts.activation is not None,
        dtype=dtype,
    )


def _kernel_product_forward(
    x: Any, acts: SiteActs, part: Coded, dtype: Any, generation: str, values: Product
) -> Any:
    return kernel_product(x, acts, part, dtype, generation, values), (x, acts, part)


def _kernel_product_backward(
    dtype: Any, generation: str, values: Product, kept: Any, dy: Any
) -> Any:
    x, _, part = kept
    dx, d_acts, d_part = jax.vjp(values, *kept)[1](dy)
    if isinstance(part.format, Int | Codebook) and not isinstance(part, Packed):
        weight = int_weight(part) if isinstance(part.format, Int) else None
        weight = codebook_weight(part) if weight is None else weight
        if not unfit_backward(part, weight, dy, generation):
            dx = backward_product(dy, weight, x.dtype, generation)
    return dx, d_acts, d_part


kernel_product.defvjp(_kernel_product_forward, _kernel_product_backward)
