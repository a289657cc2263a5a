"""ZeroQuant's settings for every linear: the smallest that costs little accuracy."""

import glob
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import sqrt
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.core.coded import encode
from qjax.core.statistics import Hessian
from qjax.methods.base import check_patterns, within
from qjax.methods.zeroquant import ZeroQuant
from qjax.observe import observe
from qjax.planning import plan
from qjax.solving import Job
from qjax.trace.batches import as_batches
from qjax.trace.control import QuantizationWarning
from qjax.trace.paths import flatten_with_paths
from qjax.trace.sites import sites

CANDIDATES = tuple(
    ZeroQuant(bits, outputs) for bits in (4, 8) for outputs in (64, 16, 1)
)
"""Int4 and int8, with 64, 16 (the paper's) and 1 outputs to a scale."""


def search_zeroquant(
    f: Callable[..., Any],
    params: Any,
    calibration: Iterable[Any],
    candidates: Sequence[ZeroQuant] = CANDIDATES,
    tolerance: float | int = 0.05,
    *,
    targets: str | tuple[str, ...] | None = None,
    ignore: str | tuple[str, ...] = (),
    mask_fn: Callable[..., Any] | None = None,
) -> tuple[ZeroQuant, ...]:
    """A recipe: for each site the candidate of fewest bits that is accurate enough.

    The error of a candidate is `|X (W - Q)| / |X W|`, from the Hessian of the float
    model's input: one pass, whatever the number of candidates. Coding of activations is
    the same for all and is not part of it. The cost is all that is stored, scales
    included. The Hessians `[K, K]` of all sites are in memory at once. Sites inside
    control flow that no data reaches are judged by their weights alone.

    Args:
      f, params, calibration, mask_fn: as for `qjax.observe`.
      candidates: settings to choose from, without patterns of their own.
      tolerance: the largest relative error allowed, above 0 up to 1. Default 0.05.
      targets: patterns of the sites to take; None takes all but the head, routers and
        embeddings.
      ignore: patterns of the sites to leave.

    Returns:
      One step for each candidate that a site takes, with the sites' names as targets.

    Raises:
      ValueError: there are no candidates, one has patterns, `tolerance` is out of
        range, or a pattern matches nothing.

    Warns:
      QuantizationWarning: no candidate is accurate enough for some sites; they are
        named and get the most accurate one.
    """
    within("search_zeroquant", "tolerance", tolerance, 0, 1)
    check_patterns("search_zeroquant", targets, ignore)
    check_candidates(candidates)
    batches = as_batches(calibration)
    if not batches:
        raise ValueError(
            "search_zeroquant needs at least one batch of calibration data"
        )
    found = sites(f, params, *batches[0])
    asked = ZeroQuant(targets=targets, ignore=ignore)
    jobs = plan([asked], found, dict(flatten_with_paths(params)))
    names = [n for job in jobs for n, s in zip(job.names, job.steps) if s is not None]
    literal = tuple(glob.escape(name) for name in names)
    seen = observe(f, params, batches, Hessian(), targets=literal, mask_fn=mask_fn)
    table: dict[str, Any] = {}
    for job in jobs:
        table |= errors_and_bits(job, candidates, seen)
    chosen = {name: choose(row[0], row[1], tolerance) for name, row in table.items()}
    _warn({n: table[n][0] for n in names}, chosen, tolerance)
    return tuple(
        replace(candidate, targets=tuple(glob.escape(n) for n in members))
        for number, candidate in enumerate(candidates)
        for members in [[n for n in names if chosen[n] == number]]
        if members
    )


def check_candidates(candidates: Sequence[ZeroQuant]) -> None:
    """Refuse candidates that are none.

    Raises:
      ValueError: there are none, or one has patterns.
    """
    if not candidates:
        raise ValueError("search_zeroquant: candidates is empty; give ZeroQuant()s")
    for each in candidates:
        if not isinstance(each, ZeroQuant) or each.targets or each.ignore:
            raise ValueError(
                "search_zeroquant: candidates must be ZeroQuant() without targets and "
                f"ignore, got {each!r}"
            )


def errors_and_bits(
    job: Job, candidates: Sequence[ZeroQuant], seen: Mapping[str, Any]
) -> dict[str, tuple[list[float], list[float]]]:
    """By name, the relative error and the bits per weight of every candidate."""
    taken = job.wanted(0)
    matrices = dict(zip(taken, job.matrices(taken)))
    found = {}
    for layer, name in enumerate(job.names):
        if job.steps[layer] is None:
            continue
        first = layer * job.per_name
        w = jnp.stack([matrices[first + i] for i in range(job.per_name)])
        h = seen.get(name)
        if h is None:
            h = jnp.eye(w.shape[-2])
        h = jnp.broadcast_to(h.reshape(-1, *h.shape[-2:]), (len(w), *h.shape[-2:]))
        scores = [relative_error(w, h, candidate) for candidate in candidates]
        bits = [bits_per_weight(w, candidate) for candidate in candidates]
        found[name] = ([sqrt(max(float(s), 0)) for s in scores], bits)
    return found


@partial(jax.jit, static_argnums=2)
def relative_error(w: Any, h: Any, candidate: ZeroQuant) -> Any:
    """`E|x (W - Q)|^2 / E|x W|^2` over experts `w[E, K, N]`, `h[E, K, K]`."""

    def one(pair: Any) -> Any:
        matrix, hessian = pair
        exact = matrix.astype(jnp.float32)
        delta = exact - candidate.solve(matrix)[0].decode(jnp.float32)
        return jnp.stack([_energy(delta, hessian), _energy(exact, hessian)])

    error, norm = jax.lax.map(one, (w, h)).sum(0)
    return error / jnp.where(norm > 0, norm, 1)


def _energy(matrix: Any, hessian: Any) -> Any:
    return jnp.sum(matrix * jnp.matmul(hessian, matrix, precision="highest"))


def bits_per_weight(w: Any, candidate: ZeroQuant) -> float:
    """What a candidate would store, all arrays counted; nothing is computed."""
    coded = jax.eval_shape(lambda x: encode(x, candidate.format), w)
    return coded.bits_per_weight


def choose(errors: Sequence[float], bits: Sequence[float], tolerance: float) -> int:
    """The cheapest candidate within the tolerance, else the most accurate one.

    >>> choose([0.2, 0.04, 0.01], [4.0, 4.5, 8.0], 0.05)
    1
    """
    good = [i for i, error in enumerate(errors) if error <= tolerance]
    if not good:
        return int(np.argmin(errors))
    return min(good, key=lambda i: (bits[i], errors[i]))


def _warn(
    errors: Mapping[str, Sequence[float]], chosen: Mapping[str, int], tolerance: float
) -> None:
    missed = [n for n, row in errors.items() if row[chosen[n]] > tolerance]
    if missed:
        worst = max(errors[name][chosen[name]] for name in missed)
        text = (
            f"search_zeroquant: no candidate keeps {', '.join(missed)} within the "
            f"tolerance {tolerance:g} (error up to {worst:.3g}); they get the most "
            "accurate one"
        )
        warnings.warn(text, QuantizationWarning, stacklevel=3)
