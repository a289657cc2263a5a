"""Quantization of activations that are no input of a site: keys, values, any named one.

A function names values by `jax.ad_checkpoint.checkpoint_name(x, "keys")`; those of
`qjax.models` name "keys" and "values" as a cache stores them, "queries", and
"attention", the weights of the values. LLM-QAT (https://arxiv.org/abs/2305.17888)
trains with keys and values of each token rounded so.
"""

from collections.abc import Callable, Mapping
from functools import partial, wraps
from typing import Any

from jaxtyping import Array, Float

from qjax.core.formats import Format, Int, token
from qjax.trace.apply import evaluated, low_bit
from qjax.trace.compat import names_in
from qjax.trace.control import interpreter
from qjax.trace.program import trace
from qjax.train.quantizers import InputQuantizer, check_bits, fake_input
from qjax.train.straight_through import StraightThrough


def quantize_named(
    f: Callable[..., Any], formats: Mapping[str, Any]
) -> Callable[..., Any]:
    """`f` with some of the values that it names rounded, straight-through.

    The result is a function of the same arguments: train it with `fake_quantize`, run
    it with `apply`, generate with it. What is trained is what runs; a cache of floats
    holds the rounded values, and a coded one their codes. "attention" has no name where
    one new token meets a coded cache. `quantize_cache` comes before, not after.

    Args:
      f: `f(params, *inputs)`.
      formats: by name, a format such as `Int(4, token())`, one scale for each vector
        along the last axis, or a method with dynamic ranges such as
        `StraightThrough(Int(8, token()))`.

    Returns:
      `f_named(params, *inputs)`.

    Raises:
      TypeError: a format is none, or ranges of a method are not dynamic.
      ValueError: when called, `f` gives no value such a name.
    """
    methods = {name: _method(name, each) for name, each in formats.items()}
    rules = {name: partial(_rounded, method) for name, method in methods.items()}

    @wraps(f)
    def f_named(params: Any, *inputs: Any, **options: Any) -> Any:
        program = trace(f, params, inputs, options)
        known = names_in(program.jaxpr)
        for name in methods:
            if name not in known:
                raise ValueError(
                    f"the function names no value {name!r}; its names are "
                    + (", ".join(sorted(known)) or "none")
                )
        body = interpreter(low_bit, names=rules)
        return evaluated(program, body)

    # What it makes would round nothing of this.
    vars(f_named).pop("with_coded_cache", None)
    return f_named


def quantize_kv(f: Callable[..., Any], bits: int) -> Callable[..., Any]:
    """`f` with keys and values of `bits` bits, symmetric, a scale for each vector.

    The scale is the largest magnitude over the largest code, for every token and head,
    as a coded cache has it (`f.init_cache(..., Int(4))` of `qjax.models`): rounded so
    in training, keys and values are stored there as they are.

    Raises:
      ValueError: `bits` is not a whole number from 2 to 8.
    """
    check_bits("quantize_kv", bits, 2, 8)
    format = Int(bits, token(), scale_rule="narrow")
    return quantize_named(f, {"keys": format, "values": format})


def _method(name: str, given: Any) -> InputQuantizer:
    method = StraightThrough(given) if isinstance(given, Format) else given
    if not isinstance(method, InputQuantizer):
        raise TypeError(
            f"{name!r} must be given a format such as Int(8, token()), got {given!r}"
        )
    if not method.activation.dynamic:
        raise TypeError(
            f"{name!r} must be given dynamic ranges, got {given!r}, whose ranges are "
            "learned or observed"
        )
    return method


def _rounded(method: InputQuantizer, x: Float[Array, "*B d"]) -> Float[Array, "*B d"]:
    rows = x.reshape(-1, x.shape[-1])
    return fake_input(method, rows, {}).reshape(x.shape)
