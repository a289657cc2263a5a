"""What is served: the scheme of the weights and the format of the cache."""

from dataclasses import dataclass

import jax.numpy as jnp

from qjax import schemes

CACHES = {"KV8": jnp.int8, "KVFP8": jnp.float8_e4m3fn}
FLOAT = "bf16"


@dataclass(frozen=True)
class Serving:
    """A scheme by its name on the command line.

    Attributes:
      name: `bf16`, `W4A16` or `W4A8-KV8`.
      weights: the scheme of the weights; None leaves them in bfloat16.
      cache: dtype of cached keys and values.
    """

    name: str
    weights: str | None
    cache: jnp.dtype


def serving(name: str) -> Serving:
    """The scheme of that name, `WEIGHTS` or `WEIGHTS-CACHE`, in any letters.

    >>> serving("w4a16").name
    'W4A16'
    >>> serving("W4A8-KV8").cache
    dtype('int8')

    Raises:
      ValueError: unknown weights or cache, or a scheme that needs calibration.
    """
    weights, _, cache = name.partition("-")
    if cache and cache.upper() not in CACHES:
        raise ValueError(
            f"--scheme {name!r} has cache {cache!r}; valid caches are "
            f"{', '.join(CACHES)}, or none for {FLOAT}"
        )
    kept = jnp.dtype(CACHES[cache.upper()] if cache else jnp.bfloat16)
    own = f"-{cache.upper()}" if cache else ""
    if weights.lower() == FLOAT:
        return Serving(FLOAT + own, None, kept)
    if weights.upper() not in schemes.SCHEMES:
        raise ValueError(
            f"--scheme {name!r} has weights {weights!r}; valid are {FLOAT}, "
            + ", ".join(schemes.SCHEMES)
        )
    found = schemes.SCHEMES[weights.upper()]
    if found.activations is not None and not found.activations.dynamic:
        raise ValueError(
            f"--scheme {name!r} codes activations in ranges from calibration data; "
            "plan one with dynamic ranges, such as FP8_DYNAMIC or W8A8"
        )
    return Serving(weights.upper() + own, weights.upper(), kept)
