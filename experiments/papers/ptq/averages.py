"""What several runs of one method say together."""

from typing import Any

import numpy as np


def averaged(runs: list[dict[str, list[float]]]) -> dict[str, Any]:
    """Mean, and spread where there are several, over runs that differ in batches."""
    found: dict[str, Any] = {"runs": len(runs)}
    for name in runs[0]:
        values = np.array([run[name] for run in runs])
        for key, column in zip(("perplexity", "kl"), values.T, strict=True):
            found[f"{key}_{name}"] = float(column.mean())
            if len(runs) > 1:
                found[f"{key}_{name}_std"] = float(column.std(ddof=1))
            found[f"{key}_{name}_runs"] = column.tolist()
    return found
