"""Where subcommands print."""

from rich.console import Console


def wide_console() -> Console:
    """Standard output: as wide as the terminal; 140 columns where there is none."""
    return Console(width=None if Console().is_terminal else 140)
