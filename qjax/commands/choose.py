"""`qjax choose`: which recipes suit a need, asked for or given as flags."""

import sys
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import jax
import tyro
from rich.prompt import Confirm, FloatPrompt, Prompt
from rich.table import Table

from qjax.choose import Advice, Hardware, Needs, Priority, choose, would_suit
from qjax.commands.compare import Compare
from qjax.commands.inputs import Model, TextOptions, open_model
from qjax.commands.output import wide_console
from qjax.trace.sites import sites

HARDWARE, PRIORITIES = list(get_args(Hardware)), list(get_args(Priority))


@dataclass(frozen=True)
class Choose:
    """Two or three recipes for what you have and want, with the reason for each.

    On a terminal it asks for what no flag says; elsewhere the defaults in parentheses
    hold.
    """

    model: str = "bundled"
    """The model it is for: its size decides what fits, and --run runs on it."""
    parameters: float | None = None
    """Number of weights to quantize, such as 7e9, in place of the model's own."""
    memory_gb: float | None = None
    """Memory the model must run in, in GB of 10^9 bytes (no limit)."""
    calibration: Literal["yes", "no"] | None = None
    """Whether sample inputs are at hand (no)."""
    training: Literal["yes", "no"] | None = None
    """Whether gradient steps are allowed (no)."""
    hardware: Hardware | None = None
    """Where it will run (what JAX finds here)."""
    priority: Priority | None = None
    """What matters most (quality)."""
    run_them: Annotated[bool, tyro.conf.arg(name="run")] = False
    """Compare just these recipes on the model."""
    text: tyro.conf.OmitArgPrefixes[TextOptions] = field(default_factory=TextOptions)
    out: Path = Path("results/choose")
    """Folder for the results of --run."""

    def run(self) -> None:
        """Ask, answer, and with --run compare."""
        needs = self.needs(ask=sys.stdin.isatty())
        advice = choose(needs)
        console = wide_console()
        console.print(_table(advice, needs))
        for other in would_suit(needs):
            console.print(
                f"{other.name} would suit too, but this version does not have it: "
                f"{other.reason}"
            )
        names = " ".join(each.name for each in advice)
        if self.run_them:
            compare = Compare(
                self.model,
                tuple(each.name for each in advice),
                text=self.text,
                out=self.out,
            )
            compare.run()
        else:
            model = self.model if self.parameters is None else "MODEL"
            command = f"qjax compare --model {model} --recipes {names}"
            console.print(f"compare them: {command}")

    def needs(self, *, ask: bool) -> Needs:
        """The needs by flags, by questions when `ask`, else by default."""
        memory, weights, kept = self.memory_gb, self.parameters, 0
        if memory is None and ask:
            answer = FloatPrompt.ask("Memory limit in GB (0: none)", default=0.0)
            memory = answer or None
        if memory is not None and weights is None:
            weights, kept = _count(open_model(self.model, lazy=True))
        calibration = _yes(self.calibration, "Are sample inputs at hand?", ask)
        training = _yes(self.training, "Are gradient steps allowed?", ask)
        hardware = self.hardware or _which("Hardware", _here(), HARDWARE, ask)
        return Needs(
            memory_gb=memory,
            weights=None if weights is None else _whole(weights),
            kept=kept,
            calibration=calibration,
            training=training,
            hardware=hardware,
            priority=self.priority or _which("Priority", "quality", PRIORITIES, ask),
        )


def _whole(weights: float) -> int:
    """A number of weights, given as 7e9."""
    if not 1 <= weights < float("inf"):
        raise ValueError(
            f"--parameters is {weights:g}: give a number of weights, such as 7e9"
        )
    return int(weights)


def _count(model: Model) -> tuple[int, int]:
    """How many weights a recipe takes by default, and how many stay in float."""
    found = sites(model.f, model.params, *model.example)
    looked_up = {site.path for site in found.weights if site.kind == "embedding"}
    left = looked_up | {found.head, *found.routers}
    taken = {site.path for site in found.weights} - left
    weights = sum(prod(found.shapes[path]) for path in taken)
    return weights, model.weights - weights


def _yes(flag: str | None, question: str, ask: bool) -> bool:
    if flag is not None:
        return flag == "yes"
    return Confirm.ask(question, default=False) if ask else False


def _which(question: str, default: str, choices: list[str], ask: bool) -> Any:
    return Prompt.ask(question, choices=choices, default=default) if ask else default


def _here() -> str:
    found = jax.default_backend()
    return found if found in HARDWARE else "gpu"


def _table(advice: list[Advice], needs: Needs) -> Table:
    limit = "no memory limit" if needs.memory_gb is None else f"{needs.memory_gb:g} GB"
    table = Table(
        title=f"{needs.priority} first, on {needs.hardware}, {limit}", show_lines=True
    )
    table.add_column("recipe", no_wrap=True)
    table.add_column("bits per\nweight", justify="right")
    table.add_column("why")
    for each in advice:
        table.add_row(each.name, f"{each.bits:.2f}", each.reason)
    return table
