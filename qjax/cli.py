"""The command line: `qjax compare | quantize | export | qat | eval | plan | ...`."""

import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from qjax.commands.choose import Choose
from qjax.commands.compare import Compare
from qjax.commands.evaluate import Evaluate
from qjax.commands.export import Export
from qjax.commands.finetune import Finetune
from qjax.commands.plan import Plan
from qjax.commands.qat import TrainQuantized
from qjax.commands.quantize import Quantize
from qjax.commands.sites import ShowSites

Command = (
    Annotated[Compare, tyro.conf.subcommand("compare")]
    | Annotated[Quantize, tyro.conf.subcommand("quantize")]
    | Annotated[TrainQuantized, tyro.conf.subcommand("qat")]
    | Annotated[Finetune, tyro.conf.subcommand("finetune")]
    | Annotated[Evaluate, tyro.conf.subcommand("eval")]
    | Annotated[ShowSites, tyro.conf.subcommand("sites")]
    | Annotated[Choose, tyro.conf.subcommand("choose")]
    | Annotated[Export, tyro.conf.subcommand("export")]
    | Annotated[Plan, tyro.conf.subcommand("plan")]
)


@dataclass(frozen=True)
class Program:
    """Quantize models, and see what it costs."""

    command: Command
    traceback: bool = False
    """Show where an error comes from, in place of one sentence."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit code.

    0: done; 1: an error, in one sentence on stderr; 2: wrong usage (tyro exits with
    it); 3: what was planned does not fit; 130: interrupted.
    """
    program = tyro.cli(
        Program,
        prog="qjax",
        args=arguments,
        config=(
            tyro.conf.OmitSubcommandPrefixes,
            tyro.conf.PositionalMetavarFromFieldName,
        ),
    )
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            code = program.command.run()
        except KeyboardInterrupt:
            print("qjax: interrupted", file=sys.stderr)
            return 130
        except (ValueError, TypeError, OSError) as error:
            if program.traceback:
                raise
            print(f"qjax: error: {_sentence(error)}", file=sys.stderr)
            return 1
    return code or 0


def _sentence(error: Exception) -> str:
    """The first line of an error's message, or its kind."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _show_warning(message: Any, *_: Any) -> None:
    print(f"qjax: warning: {message}", file=sys.stderr)
