"""A training job on the host: checkpoints, metrics, and going on after being killed.

Batches and random numbers depend on the step alone, so that a job that is killed and
started again makes the same steps, bit for bit.
"""

import json
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from qjax.io.arrays import spec_of
from qjax.io.folder import publish
from qjax.io.orbax import read_folder, write_folder
from qjax.train.step import TrainState

METRICS = "metrics.jsonl"
KEPT = 2  # checkpoints


def run_job(
    step: Callable[[TrainState, int], tuple[TrainState, Any]],
    state: TrainState,
    folder: Path,
    *,
    steps: int,
    save_every: int,
    evaluate: Callable[[TrainState], float] | None = None,
    evaluate_every: int = 0,
    report: Callable[[dict[str, Any]], None] = lambda line: None,
) -> TrainState:
    """Train until `steps` steps are made, from the last checkpoint in `folder`.

    Args:
      step: `step(state, number) -> (state, loss)`.
      state: before the first step; gives the structure of checkpoints.
      folder: for `metrics.jsonl` and `step-.../`; made if it is missing.
      steps: how many there are to be in all.
      save_every: steps between checkpoints; the last step always has one.
      evaluate: a held-out loss, at the start and every `evaluate_every` steps.
      evaluate_every: 0: only at the start and at the end.
      report: called with each line of metrics.

    Returns:
      The state after the last step.

    Raises:
      ValueError: a count is out of range, or a checkpoint does not fit the state.
    """
    for name, value, least in (("steps", steps, 1), ("save_every", save_every, 1)):
        if value < least:
            raise ValueError(f"{name} is {value}: give {least} or more")
    folder.mkdir(parents=True, exist_ok=True)
    state, done = _resumed(state, folder)

    def write(line: dict[str, Any]) -> None:
        with (folder / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        report(line)

    def evaluated(number: int) -> None:
        if evaluate is not None:
            write({"step": number, "held_out_loss": evaluate(state)})

    if done == 0:
        evaluated(0)
    for number in range(done, steps):
        start = time.perf_counter()
        state, loss = step(state, number)
        value = float(loss)
        seconds = round(time.perf_counter() - start, 4)
        write({"step": number + 1, "loss": value, "seconds": seconds})
        last = number + 1 == steps
        if last or (evaluate_every and (number + 1) % evaluate_every == 0):
            evaluated(number + 1)
        if last or (number + 1) % save_every == 0:
            save_state(folder, state)
    return state


def save_state(folder: Path, state: TrainState) -> Path:
    """Write a checkpoint; it has its name once it is whole. The oldest ones go."""
    target = folder / f"step-{int(state.step):08d}"
    arrays = {f"{i:05d}": x for i, x in enumerate(jax.tree.leaves(state))}
    with tempfile.TemporaryDirectory(dir=folder, prefix=".step.") as temporary:
        new = Path(temporary) / "new"
        new.mkdir()
        write_folder(new / "arrays", arrays)
        publish(new, target)
    for old in _checkpoints(folder)[:-KEPT]:
        shutil.rmtree(old)
    return target


def load_state(path: Path, like: TrainState) -> TrainState:
    """Read a checkpoint into the structure, and onto the devices, of `like`."""
    leaves, structure = jax.tree.flatten(like)
    leaves = [jnp.asarray(x) for x in leaves]
    names = [f"{i:05d}" for i in range(len(leaves))]
    specs = {name: spec_of(x) for name, x in zip(names, leaves)}
    shardings = {name: x.sharding for name, x in zip(names, leaves)}
    read = read_folder(path / "arrays", specs, shardings)
    return jax.tree.unflatten(structure, [read[name] for name in names])


def _checkpoints(folder: Path) -> list[Path]:
    found = [p for p in folder.iterdir() if re.fullmatch(r"step-\d+", p.name)]
    return sorted(found)


def _resumed(state: TrainState, folder: Path) -> tuple[TrainState, int]:
    """The last checkpoint, and metrics cut off behind it."""
    found = _checkpoints(folder)
    metrics = folder / METRICS
    if not found:
        metrics.unlink(missing_ok=True)
        return state, 0
    state = load_state(found[-1], state)
    done = int(state.step)
    lines = read_metrics(folder)
    kept = [json.dumps(line) + "\n" for line in lines if line["step"] <= done]
    new = metrics.with_suffix(".new")
    new.write_text("".join(kept), encoding="utf-8")
    new.replace(metrics)
    return state, done


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`; a last one that was cut short is left out."""
    lines = (folder / METRICS).read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]
