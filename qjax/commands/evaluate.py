"""`qjax eval`: perplexity of a model, how far it is from another, and its tasks."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.table import Table

from qjax import results
from qjax.commands.inputs import Dtype, Model, TextOptions, open_model
from qjax.commands.output import wide_console
from qjax.commands.tasks import TaskOptions, print_tasks, task_records
from qjax.data import Text
from qjax.evals import divergence, perplexity
from qjax.io.describe import describe

Values = dict[str, Any]


@dataclass(frozen=True)
class Evaluate:
    """Perplexity and next-token accuracy of a model on a text, or scores in tasks.

    With --reference also the KL divergence (nats per token) and the top-1 agreement
    between the two models. With --tasks, zero-shot and other tasks of
    lm-evaluation-harness in place of a text.
    """

    model: Annotated[str, tyro.conf.Positional]
    """A Hugging Face folder, one `qjax quantize` wrote, a hub id, or "bundled"."""
    reference: str | None = None
    """A model to compare with, usually the same in full precision."""
    text: tyro.conf.OmitArgPrefixes[TextOptions] = field(default_factory=TextOptions)
    task: tyro.conf.OmitArgPrefixes[TaskOptions] = field(default_factory=TaskOptions)
    dtype: Dtype = "float32"
    """Type to compute in."""
    out: Path | None = None
    """A JSON-lines file to add the result to."""

    def run(self) -> None:
        """Evaluate and print."""
        if self.task.tasks:
            self._run_tasks()
        elif self.task != TaskOptions():
            raise ValueError("the options of tasks need --tasks, which names them")
        else:
            self._run_text()

    def _run_text(self) -> None:
        text, model = self.text.load(), open_model(self.model)
        metrics, context = self._measure(model, text)
        table = Table(title=f"{model.name} on {text.name}", show_header=False)
        for name, value in {**metrics, **_about(context)}.items():
            table.add_row(name.replace("_", " "), _shown(value))
        wide_console().print(table)
        if self.out is not None:
            config = describe(self)
            record = results.Record(model.name, config, metrics, context)
            results.append(self.out, record)

    def _run_tasks(self) -> None:
        if self.reference or self.text.text or self.text.dataset:
            raise ValueError(
                "--tasks brings its own texts: leave out --reference, --text and "
                "--dataset"
            )
        model = open_model(self.model)
        scores, context = self.task.evaluate(model, self.dtype, self.text.batch)
        print_tasks(model.name, scores)
        if self.out is not None:
            for record in task_records(model.name, describe(self), scores, context):
                results.append(self.out, record)

    def _measure(self, model: Model, text: Text) -> tuple[Values, Values]:
        """Metrics, and what they were measured on."""
        tokens, protocol = self.text.encode(text, model)
        f, params = model.run(model.params, self.dtype)
        if self.reference is None:
            found = perplexity(f, params, tokens, protocol)
            scores, extra = found.scores, {}
        else:
            other = open_model(self.reference)
            base = other.run(other.params, self.dtype)
            found = divergence(base, (f, params), tokens, protocol)
            scores = found.candidate
            extra = {
                "kl_nats": found.kl,
                "top1_agreement": found.top1_agreement,
                "reference_perplexity": found.reference.perplexity,
            }
        metrics = {
            "perplexity": scores.perplexity,
            "next_token_accuracy": scores.accuracy,
            **extra,
            "tokens_per_second": found.tokens_per_second,
        }
        context = {
            "text": {"name": text.name, "sha256": text.sha256},
            "scored_tokens": found.tokens,
            "protocol": describe(protocol) | {"name": protocol.name},
            **results.environment(),
        }
        return metrics, context


def _about(context: dict[str, Any]) -> dict[str, Any]:
    protocol = context["protocol"]
    return {
        "tokens scored": context["scored_tokens"],
        "protocol": f"{protocol['name']}, windows of {protocol['window']} tokens",
        "text sha256": context["text"]["sha256"][:16],
        "device": context["device"],
    }


def _shown(value: Any) -> str:
    return f"{value:,.5g}" if isinstance(value, float) else str(value)
