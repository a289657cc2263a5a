"""Weight error of HQQ, of package `hqq`, and of round-to-nearest on the same arrays.

The paper's claim: at equal storage, the half-quadratic solve leaves less l_p error
(p < 1) than the grid it starts from. Arrays: Student-t weights (4 degrees of freedom,
outliers as in language models), 1024 x 512, groups of 64. Every number is the ratio to
round-to-nearest with the same float zero point.

Cost: seconds. Command: python experiments/papers/hqq/errors.py
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from hqq.core.quantize import Quantizer

from qjax.methods import HQQ, RTN
from qjax.results import Record, append, environment

RESULTS = Path(__file__).parent / "results" / "errors.jsonl"


@dataclass(frozen=True)
class Config:
    """One matrix of weights; `freedom` is that of the Student-t distribution."""

    bits: int
    group_size: int = 64
    K: int = 1024
    N: int = 512
    freedom: int = 4
    sigma: float = 0.02
    seed: int = 0


CONFIGS = {f"int{bits}": Config(bits) for bits in (1, 2, 3, 4, 8)}


def draw(config: Config) -> np.ndarray:
    rng = np.random.default_rng(config.seed)
    w = rng.standard_t(config.freedom, (config.K, config.N)) * config.sigma
    return w.astype(np.float32)


def ours(method: Any, w: np.ndarray) -> np.ndarray:
    solve = jax.jit(lambda w: method.solve(w)[0].decode(jnp.float32))
    return np.asarray(solve(jnp.asarray(w)))


def theirs(config: Config, w: np.ndarray) -> np.ndarray:
    codes, meta = Quantizer.quantize(
        torch.from_numpy(w.T.copy()),
        nbits=config.bits,
        group_size=config.group_size,
        axis=1,
        device="cpu",
        bitpack=False,
    )
    back = (codes - meta["zero"]) * meta["scale"]
    return back.reshape(w.T.shape).numpy().T


def norms(w: np.ndarray, q: np.ndarray) -> dict[str, float]:
    d = np.abs(w - q).astype(np.float64)
    return {
        "l_0.7": float(np.mean(d**0.7)),
        "l_1": float(d.mean()),
        "l_2": float(np.sqrt(np.mean(d**2))),
    }


def main() -> None:
    """One record per width and method."""
    RESULTS.unlink(missing_ok=True)
    for name, config in CONFIGS.items():
        w = draw(config)
        method = HQQ(bits=config.bits, group_size=config.group_size)
        start = norms(w, ours(RTN(weights=method.format), w))
        found = {"hqq package": theirs(config, w), "qjax HQQ": ours(method, w)}
        for who, q in found.items():
            metrics = {k: v / start[k] for k, v in norms(w, q).items()}
            record = Record(f"{name} {who}", asdict(config), metrics, environment())
            append(RESULTS, record)
            print(record.label, metrics)


if __name__ == "__main__":
    main()
