"""The README of an exported checkpoint: what it was made from, how, how good it is."""

import json
import re
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import yaml

from qjax.io.describe import describe

# The hub's names: owner/name.
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
CARD = """---
{header}
---
# {title}

{base} in low bits: `{format}` at {bits:.3f} bits per quantized weight, all overhead
counted. Quantized with qjax {qjax}.

{layers}
{recipe}{quality}"""


def model_card(
    title: str,
    base: str,
    format: str,
    bits: float,
    schemes: Mapping[str, int],
    recipe: Any = None,
    quality: Mapping[str, Any] | None = None,
) -> str:
    """The text.

    Args:
      title: the checkpoint's name.
      base: the model it was made from, a hub id or a folder's name.
      format: the checkpoint format.
      bits: per quantized weight.
      schemes: how many linear layers are stored in each way.
      recipe: what made it.
      quality: measured values by their names.
    """
    # Names come from files: one of another form must not end a line, nor the header.
    known = {"base_model": base} if HUB_ID.fullmatch(base) else {}
    header = {**known, "library_name": "transformers", "tags": [format, "qjax"]}
    return CARD.format(
        header=yaml.safe_dump(header, sort_keys=False).strip(),
        title=_line(title),
        base=_line(base),
        format=format,
        bits=bits,
        qjax=version("qjax"),
        layers=_table(("linear layers", "stored as"), _counted(schemes)),
        recipe=_recipe(recipe),
        quality=_quality(quality),
    )


def _line(text: Any) -> str:
    """As one line that a Markdown table can hold."""
    return " ".join(str(text).split()).replace("|", "\\|")


def _counted(schemes: Mapping[str, int]) -> list[tuple[Any, Any]]:
    return [(count, name) for name, count in schemes.items()]


def _table(head: tuple[str, str], rows: list[tuple[Any, Any]]) -> str:
    lines = [head, ("---", "---"), *rows]
    return "".join(f"| {_line(left)} | {_line(right)} |\n" for left, right in lines)


def _recipe(recipe: Any) -> str:
    if recipe is None:
        return ""
    text = recipe if isinstance(recipe, str) else json.dumps(describe(recipe), indent=2)
    return f"\n## Recipe\n\n```json\n{text}\n```\n"


def _quality(quality: Mapping[str, Any] | None) -> str:
    if not quality:
        return ""
    rows = [(k, f"{v:.4g}" if isinstance(v, float) else v) for k, v in quality.items()]
    return "\n## Measured quality\n\n" + _table(("what", "value"), rows)
