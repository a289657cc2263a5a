"""What `qjax eval --tasks` takes and prints."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from qjax import results
from qjax.commands.inputs import Dtype, Model
from qjax.commands.output import wide_console

if TYPE_CHECKING:
    from qjax.evals.tasks import TaskScores


@dataclass(frozen=True)
class TaskOptions:
    """Tasks of lm-evaluation-harness, in place of a text."""

    tasks: tuple[str, ...] = ()
    """Names or globs, such as piqa arc_easy or piqa,arc_easy."""
    task_files: Path | None = None
    """A folder of task files (YAML) beside lm_eval's own; Python functions that they
    name are run."""
    task_data: Path | None = None
    """The folder that data files in them are relative to (--task-files)."""
    limit: int | None = None
    """Evaluate the first so many items of each task."""
    fewshot: int | None = None
    """Examples in each prompt (as each task says)."""
    chat_template: bool = False
    """Put prompts into the tokenizer's chat template."""

    def evaluate(
        self, model: Model, dtype: Dtype, batch: int
    ) -> "tuple[list[TaskScores], dict[str, Any]]":
        """The scores of each task, and what they were measured on.

        Raises:
          ValueError: lm_eval is not installed, or the model is no decoder.
        """
        if importlib.util.find_spec("lm_eval") is None:
            raise ValueError("--tasks needs lm-evaluation-harness: install qjax[eval]")
        # Here, because they import lm_eval, which is an extra.
        from qjax.evals.tasks import evaluate_tasks  # noqa: PLC0415
        from qjax.evals.zero_shot import HarnessModel  # noqa: PLC0415

        context = getattr(model.config, "context", None)
        if context is None or getattr(model.f, "init_cache", None) is None:
            raise ValueError(
                f"{model.name} does not continue texts, which is what tasks are about"
            )
        f, params = model.run(model.params, dtype)
        harness = HarnessModel(f, params, model.tokenizer, context, batch=batch)
        scores = evaluate_tasks(
            harness,
            [name for each in self.tasks for name in each.split(",") if name],
            files=self.task_files,
            data=self.task_data,
            limit=self.limit,
            fewshot=self.fewshot,
            chat_template=self.chat_template,
        )
        return scores, {"dtype": dtype, **results.environment()}


def task_records(
    model: str, config: Any, scores: "Sequence[TaskScores]", context: dict[str, Any]
) -> list[results.Record]:
    """One record a task."""

    def record(one: "TaskScores") -> results.Record:
        errors = {f"{name}_stderr": value for name, value in one.errors.items()}
        about = {
            "task": one.name,
            "version": one.version,
            "items": one.items,
            "all_items": one.all_items,
            "fewshot": one.fewshot,
        }
        metrics = {**one.metrics, **errors}
        return results.Record(
            f"{model}, {one.name}", config, metrics, about | context, one.name
        )

    return [record(one) for one in scores]


def print_tasks(model: str, scores: "Sequence[TaskScores]") -> None:
    """A row for each metric of each task."""
    table = Table(title=f"{model}: lm-evaluation-harness")
    for head in ("task", "items", "shots", "metric", "value", "stderr"):
        table.add_column(
            head, justify="left" if head in ("task", "metric") else "right"
        )
    for one in scores:
        about = (one.name, f"{one.items} of {one.all_items}", str(one.fewshot))
        for name, value in one.metrics.items():
            error = one.errors.get(name)
            shown = "" if error is None else f"{error:.4f}"
            table.add_row(*about, name, f"{value:,.4f}", shown)
            about = ("", "", "")
    wide_console().print(table)
