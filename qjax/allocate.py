"""Mixed precision: which site gets which quantizer, for an average of bits or bytes.

The sensitivity of every site to every candidate is measured (`qjax/sensitivity.py`);
their sum is minimised under the budget, exactly (`core/knapsack.py`), with all overhead
counted: scales, zero points, codebooks.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from glob import escape
from typing import Any

import jax
import numpy as np

from qjax.allocation import AllocationReport, AllocationRow, label, site_bytes
from qjax.core.knapsack import choose_under_budget
from qjax.methods.base import check_patterns, positive_integer
from qjax.methods.rtn import RTN
from qjax.planning import plan
from qjax.recipes import is_quantizer
from qjax.sensitivity import NEED_DATA, SENSITIVITIES, Question
from qjax.solving import Job
from qjax.trace.batches import as_batch, as_batches
from qjax.trace.paths import flatten_with_paths
from qjax.trace.sites import sites

_CANDIDATES = (RTN(scheme="W4A16"), RTN(scheme="W8A16"))


@dataclass(frozen=True)
class MixedPrecision:
    """An allocate step: it becomes its candidates, each with the sites it takes.

    Args:
      candidates: quantizers without targets; None leaves a site in float. Default 4 and
        8 bits in groups of 128.
      target_bits: average bits per weight of the sites taken, overhead counted.
      target_bytes: bytes of all of them, in place of bits.
      sensitivity: "hessian", "kl" or "weights", see `qjax/sensitivity.py`.
      tokens: calibration tokens that "kl" uses, in whole batches; it makes as many
        passes as there are pairs of site and candidate.
      targets: patterns of the sites to take; None takes all but the head, routers and
        embeddings.
      ignore: patterns of the sites to leave.

    Raises:
        ValueError: not one of `target_bits` and `target_bytes`, fewer than two
            candidates, or a field out of its range.
        TypeError: a candidate is not a quantizer.
    """

    candidates: tuple[Any, ...] = _CANDIDATES
    target_bits: float | int | None = None
    target_bytes: int | None = None
    sensitivity: str = "hessian"
    tokens: int = 4096
    targets: str | tuple[str, ...] | None = None
    ignore: str | tuple[str, ...] = ()

    def __post_init__(self):
        check_patterns("MixedPrecision", self.targets, self.ignore)
        positive_integer("MixedPrecision", "tokens", self.tokens)
        if self.sensitivity not in SENSITIVITIES:
            raise ValueError(
                f"MixedPrecision.sensitivity must be one of {tuple(SENSITIVITIES)}, "
                f"got {self.sensitivity!r}"
            )
        self._check_budget()
        self._check_candidates()

    def _check_budget(self):
        if (self.target_bits is None) == (self.target_bytes is None):
            raise ValueError(
                "MixedPrecision needs target_bits (average per weight) or target_bytes "
                f"(of all weights), one of them; got {self.target_bits!r} and "
                f"{self.target_bytes!r}"
            )
        for field in ("target_bits", "target_bytes"):
            value = getattr(self, field)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(
                    f"MixedPrecision.{field} must be above 0 and finite, got {value!r}"
                )

    def _check_candidates(self):
        if len(set(self.candidates)) < 2:
            raise ValueError(
                "MixedPrecision.candidates must be at least two different quantizers, "
                f"got {self.candidates!r}"
            )
        for each in self.candidates:
            if each is None:
                continue
            if not is_quantizer(each):
                raise TypeError(
                    f"MixedPrecision.candidates holds {each!r}, which codes no weights"
                )
            if each.targets is not None or each.ignore or each.random:
                raise ValueError(
                    f"MixedPrecision.candidates holds {each!r}; candidates name no "
                    "sites (MixedPrecision.targets does) and draw no random numbers"
                )

    def allocate(
        self,
        f: Any,
        params: Any,
        calibration: Iterable[Any] | None = None,
        *,
        example: Any = None,
        mask_fn: Any = None,
    ) -> tuple[tuple[Any, ...], AllocationReport]:
        """The candidates with their sites, and why.

        Args:
          f, params: the function and its float (or lazy) parameters.
          calibration: batches, each a tuple of `f`'s inputs; "weights" needs none.
          example: one batch of shapes, where there is no calibration.
          mask_fn: token weights of a batch.

        Raises:
            ValueError: no calibration where the sensitivity needs it, or a budget that
                the smallest candidates exceed.
        """
        batches = as_batches(calibration)
        shapes = (isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(batches))
        if self.sensitivity in NEED_DATA and (not batches or any(shapes)):
            raise ValueError(
                f"MixedPrecision.sensitivity {self.sensitivity!r} needs calibration "
                "data: give calibration=[(inputs, ...), ...] with arrays, or take "
                '"weights"'
            )
        first = example if example is not None or not batches else batches[0]
        if first is None:
            raise ValueError("MixedPrecision traces f: give calibration or example")
        first = as_batch(first, "example")
        found = sites(f, params, *first)
        jobs = plan([self], found, dict(flatten_with_paths(params)))
        asked = Question(
            f, params, jobs, self.candidates, batches, mask_fn, self.tokens
        )
        return self._solved(jobs, SENSITIVITIES[self.sensitivity](asked))

    def _solved(
        self, jobs: Sequence[Job], errors: np.ndarray
    ) -> tuple[tuple[Any, ...], AllocationReport]:
        """The cheapest choices, as steps and rows."""
        each = [
            (job, i) for job in jobs for i, s in enumerate(job.steps) if s is not None
        ]
        sizes = np.array(
            [[site_bytes(job, method) for method in self.candidates] for job, _ in each]
        )
        weights = [job.per_name * job.layout.K * job.layout.N for job, _ in each]
        budget = self._budget(sum(weights), sizes)
        picks = choose_under_budget(sizes, errors, budget)
        rows = tuple(
            AllocationRow(
                job.names[i],
                pick,
                label(self.candidates[pick]),
                8 * int(size[pick]) / count,
                int(size[pick]),
                tuple(float(e) for e in error),
            )
            for (job, i), pick, size, count, error in zip(
                each, picks, sizes, weights, errors
            )
        )
        names = tuple(label(c) for c in self.candidates)
        report = AllocationReport(self.sensitivity, names, budget, sum(weights), rows)
        return self._steps(rows), report

    def _budget(self, weights: int, sizes: np.ndarray) -> int:
        if self.target_bytes is not None:
            budget, said = int(self.target_bytes), f"target_bytes {self.target_bytes}"
        else:
            assert self.target_bits is not None
            budget = int(self.target_bits * weights / 8)
            said = f"target_bits {self.target_bits}"
        least = int(sizes.min(1).sum())
        if least > budget:
            raise ValueError(
                f"MixedPrecision.{said} is too small: the smallest candidates take "
                f"{8 * least / weights:.3f} bits per weight, {least} bytes"
            )
        return budget

    def _steps(self, rows: Sequence[AllocationRow]) -> tuple[Any, ...]:
        taken = [
            tuple(escape(row.name) for row in rows if row.choice == c)
            for c in range(len(self.candidates))
        ]
        return tuple(
            replace(method, targets=names)
            for method, names in zip(self.candidates, taken)
            if method is not None and names
        )


def allocate(
    f: Any, params: Any, calibration: Any, step: MixedPrecision, **options: Any
) -> tuple[tuple[Any, ...], AllocationReport]:
    """`step.allocate(f, params, calibration, **options)`."""
    return step.allocate(f, params, calibration, **options)
