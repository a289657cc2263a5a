"""`qjax plan`: what a quantized model needs on a machine that is not here."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.progress import track

from qjax.commands.output import wide_console
from qjax.plan.compilers import find_compiler, run_plans
from qjax.plan.layouts import Layout, layout
from qjax.plan.machines import Machine, machine
from qjax.plan.picture import plan_plot
from qjax.plan.report import (
    compiled,
    failures,
    merged,
    refusals,
    table,
    uncounted,
    unknown,
)
from qjax.plan.serving import serving
from qjax.plan.steps import Load
from qjax.results import Record, append, environment

DOES_NOT_FIT = 3


@dataclass(frozen=True)
class Plan:
    """Whether a quantized model fits a machine that you do not have, and how fast it
    can be there at best.

    The decode step and a prefill are compiled by that machine's compiler, sharded over
    its devices, from shapes alone. Several values of --batch or --context make a
    picture of memory and of the roofline against them. Exit code 3: something asked
    for does not fit; 1: something could not be compiled.
    """

    model: Annotated[str, tyro.conf.Positional]
    """A folder with config.json, a hub id, "bundled", or a layout by name, such as
    Llama-3-8B."""
    scheme: tuple[str, ...] = ("bf16", "W8A8", "W4A16", "W4A8-KV8")
    """Schemes, side by side; -KV8 and -KVFP8 keep the cache in int8 and float8."""
    topology: tuple[str, ...] = ("v5e:2x4",)
    """Machines: v5e:2x4, v6e:2x2, v5p:2x2x1, v7x:2x2x1 (a chip is two devices), h200,
    h200:8."""
    batch: tuple[int, ...] = (16,)
    """Sequences decoded together; several are drawn at the first --context."""
    context: tuple[int, ...] = (4096,)
    """Tokens of room for each in the cache; several are drawn at the first --batch."""
    prompt: int = 1024
    """Tokens of the prompt of a prefill."""
    steps: tuple[Literal["decode", "prefill"], ...] = ("decode", "prefill")
    """The programs to compile."""
    compiler: tuple[Path, ...] = ()
    """Folders to look for the machines' compilers in (beside and among this
    environment's packages)."""
    out: Path = Path("results/plan")
    """Folder for JSON lines and pictures, one of each for a machine."""

    def run(self) -> int:
        """Compile, print, save; returns the exit code.

        Raises:
          ValueError: a value is not known, missing or given twice; or, when the rest is
            saved, a program failed to compile.
        """
        self = self.checked()
        model, machines = layout(self.model), [machine(n) for n in self.topology]
        plans, beyond = self.plans(), self.beyond(model)
        compilers = [find_compiler(m.platform, self.compiler) for m in machines]
        self.out.mkdir(parents=True, exist_ok=True)  # or fail before anything is made
        everything: list[Record] = []
        failed: list[str] = []
        for place, compiler in zip(machines, compilers):
            rows = track(
                run_plans(model, place, plans, compiler),
                description=f"compiling for {place.name}",
                total=len(plans),
            )
            records = list(_records(rows, model, place, len(self.steps)))
            if len(self.batch) * len(self.context) > 1:
                records = [_with_load(record) for record in records]
            if any(compiled(record) for record in records):
                self.save(records, model, place, beyond)
            failed += [f"{place.name}, {sentence}" for sentence in failures(records)]
            everything += records
        if failed:
            raise ValueError(_first_of(failed))
        fits = all(record.metrics["fits"] == "yes" for record in everything)
        return 0 if fits else DOES_NOT_FIT

    def checked(self) -> "Plan":
        """With the names by which schemes and machines are known.

        Raises:
          ValueError: a list has nothing in it or a thing twice, or a name is not known.
        """
        found = replace(
            self,
            scheme=tuple(serving(name).name for name in self.scheme),
            topology=tuple(machine(name).name for name in self.topology),
        )
        found.check()
        return found

    def check(self) -> None:
        """Refuse lists with nothing in them, and those that name a thing twice.

        Raises:
          ValueError: names the option.
        """
        for name in ("scheme", "topology", "batch", "context", "steps"):
            values = getattr(self, name)
            twice = [v for i, v in enumerate(values) if v in values[:i]]
            if twice:
                raise ValueError(f"--{name} has {twice[0]} twice: give each value once")
            if not values:
                raise ValueError(f"--{name} is empty: give at least one value")

    def plans(self) -> list[dict[str, Any]]:
        """The programs to compile, steps of one scheme together.

        Raises:
          ValueError: a scheme is not known, or a number is out of range.
        """
        loads = [(batch, self.context[0]) for batch in self.batch]
        loads += [(self.batch[0], context) for context in self.context[1:]]
        found = [
            {
                "scheme": name,
                "batch": batch,
                "context": context,
                "prompt": self.prompt,
                "step": step,
            }
            for name, (batch, context), step in product(self.scheme, loads, self.steps)
        ]
        for each in found:
            Load(each["step"], each["batch"], each["context"], each["prompt"])
        return found

    def beyond(self, model: Layout) -> str:
        """That more room is asked for than the model has positions, or nothing.

        Raises:
          ValueError: its positions are learned, so that there are no more of them.
        """
        most = model.positions
        if most is None or max(self.context) <= most:
            return ""
        said = (
            f"--context is {max(self.context)}, but {model.name} has {most} positions"
        )
        if model.learned_positions:
            raise ValueError(said)
        return f"{said} by its configuration: what it says beyond them is not known"

    def save(
        self, records: Sequence[Record], model: Layout, place: Machine, beyond: str
    ) -> None:
        """Print the table; write JSON lines, all or none, and the picture."""
        console = wide_console()
        console.print(table(records, place, model.name))
        for sentence in refusals(records):
            console.print(f"qjax plan: {sentence}", style="red", highlight=False)
        for sentence in [*uncounted(records), *filter(None, [beyond])]:
            console.print(f"qjax plan: {sentence}", highlight=False)
        stem = re.sub(r"[^a-z0-9.]+", "-", f"{model.name} {place.name}".lower())
        lines = self.out / f"{stem}.jsonl"
        begun = lines.with_suffix(".part")
        begun.unlink(missing_ok=True)
        for record in records:
            append(begun, record)
        begun.replace(lines)
        plan_plot(self.out / f"{stem}.png", records, place, model.name)
        console.print(f"wrote {lines} and its picture")


def _records(
    rows: Iterable[dict[str, Any]], model: Layout, place: Machine, steps: int
) -> Iterator[Record]:
    """Records of consecutive programs of one scheme, with what they were made for."""
    chip = place.chip
    context = {
        "model": {"name": model.name, "weights": model.weights},
        "topology": place.name,
        "devices": place.devices,
        "peaks": chip.peaks,
        "memory": chip.memory,
        "bandwidth": chip.bandwidth,
        "link": chip.link,
        "source": chip.source,
        "unknown": unknown(place),
        **environment(),
    }
    programs: dict[str, dict[str, Any]] = {}
    for row in rows:
        programs[row["step"]] = row
        if len(programs) == steps:
            found = merged(str(row["scheme"]), programs)
            yield replace(found, context=context)
            programs = {}


def _first_of(sentences: Sequence[str]) -> str:
    """One sentence for several."""
    more = f"; {len(sentences) - 1} more failed" if sentences[1:] else ""
    return sentences[0] + more


def _with_load(record: Record) -> Record:
    """The record, its label with batch and context."""
    c = record.config
    return replace(record, label=f"{record.label}, {c['batch']} x {c['context']:,}")
