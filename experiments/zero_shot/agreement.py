"""The bundled model under qjax's adapter and under lm_eval's `hf` adapter in torch.

Both score the same items of the same tasks in float32; a record for each task says how
often they predict the same.

    python experiments/zero_shot/agreement.py --data FOLDER [--limit 200] [--tasks NAME]
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval.models.huggingface import HFLM

from qjax import results
from qjax.commands.inputs import BUNDLED, open_model
from qjax.evals.tasks import TaskScores, evaluate_tasks
from qjax.evals.zero_shot import HarnessModel

HERE = Path(__file__).parent
BATCH = 8


def prediction(sample: dict[str, Any]) -> Any:
    """What an item's answers say: the choice, whether the word is right, the text."""
    answers = sample["filtered_resps"]
    if isinstance(answers[0], str):
        return sample["resps"][0][0]
    if len(answers) > 1:
        return int(np.argmax([nats for nats, _ in answers]))
    return bool(answers[0][1])


def nats(sample: dict[str, Any]) -> list[float]:
    """The log likelihoods of an item."""
    found = [x[0] if isinstance(x, (list, tuple)) else x for x in _answers(sample)]
    return [float(x) for x in found if not isinstance(x, str)]


def _answers(sample: dict[str, Any]) -> list[Any]:
    return [response[0] for response in sample["resps"]]


def compared(ours: TaskScores, theirs: TaskScores) -> dict[str, Any]:
    """Metrics of both and how often they agree, item by item."""
    pairs = list(zip(ours.samples, theirs.samples, strict=True))
    assert all(a["doc_hash"] == b["doc_hash"] for a, b in pairs)
    found: dict[str, Any] = {"items": len(pairs)}
    rolling = "word_perplexity" in ours.metrics
    if not rolling:
        found["agreement"] = np.mean([prediction(a) == prediction(b) for a, b in pairs])
    for name, value in ours.metrics.items():
        plain = name.partition(",")[0]
        found |= {f"{plain}_qjax": value, f"{plain}_hf": theirs.metrics[name]}
    a, b = (np.array([x for one in side for x in nats(one)]) for side in zip(*pairs))
    if a.size:
        found["largest_difference_nats"] = float(np.abs(a - b).max())
        found["largest_relative_difference"] = float(np.abs(a / b - 1).max())
    return {k: float(v) if k != "items" else v for k, v in found.items()}


def main() -> None:
    """Evaluate both on every task."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--tasks", nargs="+", default=["local_*"])
    parser.add_argument("--out", type=Path, default=HERE / "results/agreement.jsonl")
    options = parser.parse_args()
    bundled = open_model("bundled")
    f, params = bundled.run(bundled.params, "float32")
    context = bundled.config.context
    models = [
        HarnessModel(f, params, bundled.tokenizer, context, batch=BATCH),
        HFLM(str(BUNDLED), dtype="float32", device="cpu", batch_size=BATCH),
    ]
    both = [
        evaluate_tasks(
            model,
            options.tasks,
            files=HERE / "tasks",
            data=options.data,
            limit=options.limit,
        )
        for model in models
    ]
    for ours, theirs in zip(*both, strict=True):
        metrics = compared(ours, theirs)
        context = {
            "model": {"name": bundled.name, "weights": bundled.weights},
            "limit": options.limit,
            "all_items": ours.all_items,
            "dtype": "float32",
            **results.environment(),
        }
        name = ours.name.removeprefix("local_")
        config = {"task": ours.name, "batch": BATCH, "fewshot": ours.fewshot}
        results.append(options.out, results.Record(name, config, metrics, context))
        print(name, metrics)


if __name__ == "__main__":
    main()
