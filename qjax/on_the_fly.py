"""Quantization while a model is loaded: no data, one matrix in float at a time.

What bitsandbytes, EETQ and other on-the-fly quantizers offer, for every method that
needs the weights alone.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from qjax.io.huggingface import find_folder, load_weights, read_tokenizer
from qjax.models import Function
from qjax.quantize import quantize
from qjax.recipes import needs_data, steps_of


def load_quantized(
    path_or_id: str | Path,
    recipe: Any,
    *,
    key: Any = None,
    progress: bool = True,
    batch_bytes: int = 1,
    **options: Any,
) -> tuple[Function, dict[str, Any], Any, Any]:
    """A model with the recipe's leaves quantized as they are read.

    A float leaf is read, quantized and dropped before the next one is read, so that
    memory peaks at the quantized model and one leaf: one layer's matrix, or, with
    `scan_layers=True`, one stack of all layers. In NVFP4 it is the leaves of one input
    in place of one leaf, as they share their second scale. Leaves that the recipe does
    not take (the embedding, norms, by default the head) are read as they are.

    Args:
      path_or_id: a folder with `config.json` and safetensors, or the id of a
        repository on the hub.
      recipe: methods that need no data, such as `EETQ()`, `RTN("W8A16")`,
        `RTN("NF4")`, `RTN("FP8_DYNAMIC")` or `HQQ()`.
      key: for methods that draw random numbers.
      progress: show a progress bar.
      batch_bytes: float32 bytes of weights solved at once, at least one matrix; more
        is faster where there are many small ones.
      **options: of `load_model`: `dtype`, `scan_layers`, `sharding`.

    Returns:
      `(f, qparams, tokenizer, config)`, as from `load_model`; run it as
      `qjax.apply(f)(qparams, tokens)`.

    Raises:
      FileNotFoundError: the folder, the repository or a file is missing.
      ValueError: a step needs calibration data, or whatever `load_model` and `quantize`
        refuse.
    """
    for step in steps_of(recipe):
        if needs_data(step):
            raise ValueError(
                f"{type(step).__name__} needs calibration data, which loading has not: "
                "use qjax.load_model(..., lazy=True) and qjax.quantize"
            )
    folder = find_folder(path_or_id)
    f, params, config = load_weights(folder, lazy=True, **options)
    tokens = jax.ShapeDtypeStruct((1, 16), jnp.int32)
    qparams = quantize(
        f,
        params,
        recipe,
        example=(tokens,),
        key=key,
        progress=progress,
        batch_bytes=batch_bytes,
    )
    return f, qparams, read_tokenizer(folder), config
