"""Keys and values in float8, on scales that calibration finds for each layer.

What vLLM calls an fp8 KV cache with `k_scale` and `v_scale`: a key, rotated, is rounded
to e4m3 times `absmax / 448` of all keys of its layer that calibration saw, and a value
likewise.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qjax.core.coded import encode
from qjax.models.functional import Function
from qjax.models.layers import FLOAT8
from qjax.trace.apply import apply
from qjax.trace.paths import flatten_with_paths

SCALES = {"k_scale": "k", "v_scale": "v"}


@dataclass(frozen=True)
class KVCache:
    """The step of a recipe that has keys and values in float8: `quantize_cache`.

    It changes the function as well as the parameters, so that `qjax quantize` runs it,
    before the other steps, and `qjax.quantize` refuses it.
    """

    codes_cache: ClassVar[bool] = True


def quantize_cache(
    f: Any, params: Any, batches: Iterable[tuple[Any, ...]]
) -> tuple[Function, Any]:
    """The model with keys and values in float8, on scales from calibration.

    The scale is `absmax / 448`, as compressed-tensors and llm-compressor take it; keys
    and values are seen as `params` make them, in one pass in which they are not rounded
    yet. Before `quantize`, with float parameters, the scales are llm-compressor's;
    after it, those of the quantized model. `export` writes them and `kv_cache_scheme`.

    Args:
      f: of a decoder, from `load_model`.
      params: its parameters.
      batches: calibration; a batch is `(tokens,)`, without padding.

    Returns:
      `(f, params)`: the function of the same inputs, and the parameters with two more
      leaves in each layer, `k_scale[1]` and `v_scale[1]`, float32.

    Raises:
      TypeError: `f` is of a model whose cache cannot be coded.
      ValueError: it is coded already, or there are no batches.
    """
    if getattr(f, "with_coded_cache", None) is None:
        raise TypeError(
            "quantize_cache needs the function of a decoder that load_model read, of "
            f"Llama or its kind, before quantize_kv or quantize_named; this "
            f"{type(f).__name__} cannot code its cache"
        )
    if holds_cache_scales(params):
        raise ValueError("the parameters have scales for keys and values already")
    run, largest = jax.jit(lambda params, tokens: _largest(f, params, tokens)), None
    for (tokens,) in batches:
        seen = run(params, jnp.asarray(tokens))
        largest = seen if largest is None else jax.tree.map(jnp.maximum, largest, seen)
    if largest is None:
        raise ValueError("batches is empty: scales come from what calibration sees")
    return f.with_coded_cache(), _with_scales(params, jax.tree.map(_scale, largest))


def holds_cache_scales(params: Any) -> bool:
    """Whether the parameters hold scales for keys and values."""
    return any(path.endswith("attn/k_scale") for path, _ in flatten_with_paths(params))


def _largest(f: Function, params: Any, tokens: Any) -> dict[str, Float[Array, " L"]]:
    """The largest magnitude in each layer's keys and values."""
    assert f.init_cache is not None
    dtype = jax.eval_shape(apply(f), params, tokens).dtype
    batch, length = tokens.shape
    _, cache = apply(f)(params, tokens, f.init_cache(batch, length, dtype))
    return {
        name: jnp.max(jnp.abs(getattr(cache, each).astype(jnp.float32)), (1, 2, 3, 4))
        for name, each in SCALES.items()
    }


@jax.jit
def _scale(largest: Float[Array, " L"]) -> Float[Array, "L 1"]:
    """The format's own scale for a range."""
    scales = jax.vmap(lambda x: encode(x.reshape(1, 1), FLOAT8.format).scale)(largest)
    return scales.reshape(-1, 1)


def _with_scales(params: Any, scales: dict[str, Float[Array, "L 1"]]) -> Any:
    """Stacked layers get `[L, 1]`, others `[1]` each."""
    layers = params["layers"]
    if "attn" in layers:
        layers = {**layers, "attn": {**layers["attn"], **scales}}
    else:
        layers = {
            index: {
                **layer,
                "attn": {
                    **layer["attn"],
                    **{name: each[int(index)] for name, each in scales.items()},
                },
            }
            for index, layer in layers.items()
        }
    return {**params, "layers": layers}
