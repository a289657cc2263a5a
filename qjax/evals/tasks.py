"""Tasks of lm-evaluation-harness, its own or from local files, on a qjax model."""

import contextlib
import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets.exceptions import DatasetsError
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

from qjax.evals.zero_shot import HarnessModel

SHOWN = 3


@dataclass(frozen=True)
class TaskScores:
    """One task, or a group of them.

    `metrics` by the harness's names, `acc` or, with a filter, `exact_match,strict`;
    `errors`: the standard error of each that is a mean over items; `items`: how many
    were evaluated, of `all_items`; `fewshot`: examples in each prompt.
    """

    name: str
    metrics: Mapping[str, float]
    errors: Mapping[str, float]
    items: int
    all_items: int
    fewshot: int
    version: str
    samples: Sequence[Mapping[str, Any]] = field(repr=False)


def evaluate_tasks(
    model: HarnessModel,
    tasks: Sequence[str],
    *,
    files: Path | None = None,
    data: Path | None = None,
    limit: int | None = None,
    fewshot: int | None = None,
    chat_template: bool = False,
) -> list[TaskScores]:
    """Scores of a model in every task, group or tag that the names or globs match.

    Args:
      model: the model.
      tasks: such as `piqa`, `mmlu`, `arc_*`.
      files: a folder of task files (YAML) that add to the harness's, or replace those
        of the same name. They may name Python functions beside them, which are run.
      data: the folder that relative `data_files` in task files are taken from; `files`
        unless given.
      limit: evaluate the first so many items of each task.
      fewshot: examples in a prompt; None as each task says.
      chat_template: whether prompts are put into the tokenizer's chat template.

    Raises:
      FileNotFoundError: a folder is missing.
      OSError: the data of a task cannot be had.
      ValueError: a name matches nothing, or a number is out of range.
    """
    _check(tasks, files, data, limit, fewshot)
    manager = _manager(tasks, files, data or files)
    found: Any = simple_evaluate(
        model,
        tasks=[name for each in tasks for name in _matches(manager, each)],
        task_manager=manager,
        limit=limit,
        num_fewshot=fewshot,
        apply_chat_template=chat_template,
        bootstrap_iters=0,
    )
    assert found is not None  # it is None on ranks above 0 alone
    results: dict[str, Any] = dict(found)
    return [_scores(name, results) for name in results["results"]]


def _check(tasks, files, data, limit, fewshot) -> None:
    if not tasks:
        raise ValueError("no task is named")
    for folder in (files, data):
        if folder is not None and not folder.is_dir():
            raise FileNotFoundError(f"there is no folder {folder}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}: it must be at least 1 item")
    if fewshot is not None and fewshot < 0:
        raise ValueError(f"fewshot is {fewshot}: it must be 0 or more")


class _Manager(TaskManager):
    """Takes relative paths of data from a folder; says in a sentence what is missing.

    A task file can say where its data lie, but not from where to look.
    """

    def __init__(self, data: Path | None, **options: Any):
        super().__init__(**options)
        self.data = data

    def load(self, task_list: Any) -> Any:
        here = contextlib.chdir(self.data) if self.data else contextlib.nullcontext()
        try:
            with here:
                return super().load(task_list)
        except (OSError, ValueError, RuntimeError, DatasetsError) as error:
            reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
            raise OSError(
                f"of the tasks {', '.join(map(str, task_list))} one cannot be made, or "
                f"its data are neither cached nor reachable ({reason})"
            ) from error


def _manager(
    tasks: Sequence[str], files: Path | None, data: Path | None
) -> TaskManager:
    """The index of tasks: the local ones if they suffice, which is quick, or all."""
    if files is None:
        return _Manager(data)
    where = str(files.resolve())
    local = _Manager(data, include_path=where, include_defaults=False)
    if all(local.match_tasks([name]) for name in tasks):
        return local
    return _Manager(data, include_path=where)


def _matches(manager: TaskManager, name: str) -> list[str]:
    found = manager.match_tasks([name])
    if not found:
        near = difflib.get_close_matches(name, manager.all_tasks, SHOWN)
        hint = f"; there are {', '.join(near)}" if near else ""
        raise ValueError(f"task {name!r} is unknown to lm_eval{hint}")
    return found


def _scores(name: str, found: Mapping[str, Any]) -> TaskScores:
    samples = found["samples"].get(name, [])
    counts = found["n-samples"].get(name, {"original": 0, "effective": 0})
    metrics, errors = {}, {}
    for key, value in found["results"][name].items():
        metric, _, filtered = key.partition(",")
        if not filtered or metric.endswith("_stderr") or isinstance(value, str):
            continue
        shown = metric if filtered == "none" else key
        metrics[shown] = float(value)
        rows = [row.get(metric) for row in samples if row["filter"] == filtered]
        error = _standard_error(rows, metrics[shown])
        if error is not None:
            errors[shown] = error
    return TaskScores(
        name=name,
        metrics=metrics,
        errors=errors,
        items=counts["effective"],
        all_items=counts["original"],
        fewshot=found["n-shot"].get(name, 0),
        version=str(found["versions"].get(name, "")),
        samples=samples,
    )


def _standard_error(values: Sequence[Any], mean: float) -> float | None:
    """Of the mean of the items' values; None where the metric is not their mean."""
    if len(values) < 2 or not all(isinstance(v, (int, float)) for v in values):
        return None
    if not math.isclose(math.fsum(values) / len(values), mean, abs_tol=1e-9):
        return None
    spread = math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1)
    return math.sqrt(spread / len(values))
