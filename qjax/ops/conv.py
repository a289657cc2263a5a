"""Convolution with a quantized kernel."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from qjax.core.coded import Coded
from qjax.core.formats import Int
from qjax.core.qtensor import QTensor, SiteActs
from qjax.core.rounding import straight_through
from qjax.ops.activations import code_input, integers


def conv(
    x: Any,
    q: QTensor,
    arrange: Callable[[Any], Any],
    params: dict[str, Any],
    *,
    site: int = 0,
    dtype: Any = None,
) -> jax.Array:
    """`lax.conv_general_dilated(x, W)`; `W` has `K = window * in / groups`.

    With one scale per output feature the codes themselves are convolved and the scale
    is put on the result; an `Int` activation format then contracts int8 with int8 into
    int32, with one scale per image (the format's granularity speaks of the flattened
    image). Other granularities decode the kernel in place. A correction bias is added
    on the feature axis.

    Args:
      x: the image, as the convolution's dimension numbers say.
      q: the kernel.
      arrange: matrix `[K, N]` to the kernel's own axes; hashable by value.
      params: the other arguments of `lax.conv_general_dilated`.
      site: position among the leaf's sites.
      dtype: of the result; default that of `x`.
    """
    dtype = jnp.dtype(x.dtype if dtype is None else dtype)
    frozen = tuple(sorted(params.items()))
    return _qconv(x, q, arrange, frozen, site, dtype)


def conv_contraction(q: QTensor, site: int) -> str:
    """How the kernel is contracted.

    "int": int8 with int8; "scaled": codes with floats, the scale on the result;
    "values": what the codes stand for.
    """
    q = replace(q, bias=None)
    formats = [part.format for part in q.parts]
    if not q.plain or len(formats) > 1:
        return "values"
    format, activation = formats[0], q.site(site).activation
    if not isinstance(format, Int) or format.granularity.rows is not None:
        return "values"
    if format.zero != "none":
        return "values"
    if activation is None:
        return "scaled"
    own = activation.format
    if not isinstance(own, Int) or not own.symmetric:
        return "values"
    return "int" if own.granularity.rows is None else "values"


def _conv(
    x: Any,
    q: QTensor,
    arrange: Callable[[Any], Any],
    frozen: tuple[tuple[str, Any], ...],
    site: int,
    dtype: Any,
) -> Any:
    params, acts = dict(frozen), q.site(site)
    way = conv_contraction(q, site)
    if way == "int":
        y = _coded_conv(x, acts, q.parts[0], arrange, frozen)
    elif way == "scaled":
        grid, codes = q.parts[0].grid(), _whole(q.parts[0])
        y = _run(x, arrange(codes).astype(x.dtype), params, jnp.float32)
        y = y * _along(grid.scale, q.parts[0], params)
    else:
        image = x if acts.activation is None else _image_values(x, acts, params)
        y = _run(image, arrange(q.matrix(x.dtype, site)), params, dtype)
    if q.bias is not None:
        shape = [1] * y.ndim
        shape[params["dimension_numbers"].out_spec[1]] = -1
        y = y + q.bias.reshape(shape).astype(y.dtype)
    return y.astype(dtype)


_conv.__name__ = "qconv"
_qconv = jax.jit(_conv, static_argnums=(2, 3, 4, 5))


@partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def _coded_conv(
    x: Any, acts: SiteActs, part: Coded, arrange: Callable[[Any], Any], frozen: Any
) -> Any:
    """Codes convolved with codes; the gradient is that of the values."""
    params = dict(frozen)
    coded, back = _code_image(x, acts, params)
    image = back(integers(coded.codes, coded.grid, coded.format)[0])
    y = _run(image, arrange(_whole(part)), params, jnp.int32).astype(jnp.float32)
    spec = params["dimension_numbers"]
    shape = [1] * x.ndim
    shape[spec.out_spec[0]] = -1
    images = x.shape[spec.lhs_spec[0]]
    steps = jnp.broadcast_to(coded.grid.scale[0].astype(jnp.float32), (images,))
    return y * steps.reshape(shape) * _along(part.grid().scale, part, params)


@_coded_conv.defjvp
def _coded_conv_jvp(arrange: Any, frozen: Any, primals: Any, tangents: Any) -> Any:
    params = dict(frozen)

    def values(x: Any, acts: SiteActs, part: Coded) -> Any:
        kernel = arrange(part.decode(x.dtype))
        return _run(_image_values(x, acts, params), kernel, params, jnp.float32)

    out = _coded_conv(*primals, arrange, frozen)
    return out, jax.jvp(values, primals, tangents)[1]


def _run(x: Any, kernel: Any, params: dict[str, Any], dtype: Any) -> Any:
    given = {k: v for k, v in params.items() if k != "preferred_element_type"}
    return jax.lax.conv_general_dilated(
        x, kernel, **given, preferred_element_type=dtype
    )


def _whole(part: Coded) -> Any:
    """int8 codes of a kernel without zero points."""
    assert isinstance(part.format, Int)
    return integers(part.unpack(), part.grid(), part.format)[0]


def _along(scale: Any, part: Coded, params: dict[str, Any]) -> Any:
    """`[1, Gn]` scales along the result's feature axis."""
    spec, features = params["dimension_numbers"].out_spec, part.shape[1]
    shape = [1] * len(spec)
    shape[spec[1]] = features
    cols = part.format.granularity.cols or features
    wide = jnp.repeat(scale[0].astype(jnp.float32), cols)[:features]
    return wide.reshape(shape)


def _code_image(x: Any, acts: SiteActs, params: dict[str, Any]) -> tuple[Any, Any]:
    """The image coded as `[features, images]`, and the way back to its own axes."""
    axis = params["dimension_numbers"].lhs_spec[0]
    images = jnp.moveaxis(x, axis, 0)
    coded = code_input(images.reshape(images.shape[0], -1), acts)

    def back(values: Any) -> Any:
        return jnp.moveaxis(values.T.reshape(images.shape), 0, axis)

    return coded, back


def _image_values(x: Any, acts: SiteActs, params: dict[str, Any]) -> Any:
    """The values that the image's codes stand for, with the identity's gradient."""
    coded, back = _code_image(x, acts, params)
    return straight_through(x, back(coded.format.from_codes(coded.codes, coded.grid)))
