"""JSON that somebody else wrote."""

import json
from typing import Any


def parse_json(text: str | bytes, what: str) -> Any:
    """The value of a JSON text.

    Args:
      text: bytes are read as UTF-8.
      what: names the text in the message: "file x", "line 3 of x".

    Raises:
      ValueError: it is no JSON, or brackets are nested deeper than Python reads.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError(f"{what} is no JSON: it is nested too deeply") from None
    # No JSON, no UTF-8, or a number of thousands of digits.
    except ValueError as error:
        raise ValueError(f"{what} is no JSON: {error}") from None
