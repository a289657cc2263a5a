"""Convolution with a quantized kernel."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from qjax.core.formats import Int
from qjax.core.qtensor import QTensor
from qjax.ops.activations import integers


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
    image). Other granularities decode the kernel in place.

    Args:
      x: the image, as the convolution's dimension numbers say.
      q: the kernel.
      arrange: matrix `[K, N]` to the kernel's own axes.
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
    params = dict(frozen)
    way, acts = conv_contraction(q, site), q.site(site)
    image = None
    if acts.activation is not None:
        image = _code_image(x, acts.activation, params["dimension_numbers"].lhs_spec[0])
    if way == "values":
        x = x if image is None else image[2].astype(x.dtype)
        return _run(x, arrange(q.matrix(x.dtype, site)), params, dtype)
    part = q.parts[0]
    assert isinstance(part.format, Int)
    grid = part.grid()
    codes, _ = integers(part.unpack(), grid, part.format)
    scale = _along(grid.scale.astype(jnp.float32), params, q.layout.N)
    if image is None or way == "scaled":
        y = _run(x, arrange(codes).astype(x.dtype), params, jnp.float32)
        return (y * scale).astype(dtype)
    y = _run(image[0], arrange(codes), params, jnp.int32).astype(jnp.float32)
    return (y * (scale * image[1])).astype(dtype)


_conv.__name__ = "qconv"
_qconv = jax.jit(_conv, static_argnums=(2, 3, 4, 5))


def _run(x: Any, kernel: Any, params: dict[str, Any], dtype: Any) -> Any:
    given = {k: v for k, v in params.items() if k != "preferred_element_type"}
    return jax.lax.conv_general_dilated(
        x, kernel, **given, preferred_element_type=dtype
    )


def _along(scale: Any, params: dict[str, Any], features: int) -> Any:
    """`[1, N]` or `[1, 1]` scales along the result's feature axis."""
    spec = params["dimension_numbers"].out_spec
    shape = [1] * len(spec)
    shape[spec[1]] = features
    cols = -(-features // scale.shape[-1])
    return jnp.repeat(scale[0], cols)[:features].reshape(shape)


def _code_image(x: Any, activation: Any, batch_axis: int) -> tuple[Any, Any, Any]:
    """int8 codes, one scale per image that broadcasts over it, and the values."""
    format = activation.format
    images = jnp.moveaxis(x, batch_axis, 0)
    flat = images.reshape(images.shape[0], -1).T
    grid = format.fit(flat)
    codes = format.to_codes(flat, grid)

    def back(values: Any) -> Any:
        return jnp.moveaxis(values.T.reshape(images.shape), 0, batch_axis)

    values = back(format.from_codes(codes, grid))
    if not isinstance(format, Int) or not format.symmetric:
        return None, None, values
    shape = [1] * x.ndim
    shape[batch_axis] = -1
    scale = jnp.broadcast_to(grid.scale[0], (images.shape[0],)).reshape(shape)
    return back(integers(codes, grid, format)[0]), scale.astype(jnp.float32), values
