"""Calibration and evaluation tokens for both sides of the comparison, as npz files.

Writes `calibration.npz` (`rows` windows of `length` tokens, evenly spaced over the
text) and one `<text>.npz` for each evaluated text (its first `tokens`, in windows of
`length`, side by side: protocol "nonoverlap" of `qjax.evals`). Without `--calibration`
the windows come from the end of the Python language reference, whose beginning is
evaluated; a text that would serve for both is refused. With `--random` the rows are
uniform random ids, for timing models that have no tokenizer.

Command: python experiments/papers/ptq/tokens.py --calibration wiki.txt \\
    --wikitext2 test.txt
"""

import argparse
import hashlib
import json
from pathlib import Path

import numpy as np

from qjax.data import Text, encode_text, file_text, pydoc_text
from qjax.io.huggingface import read_tokenizer

ROOT = Path(__file__).parents[3]


def spaced(tokens: np.ndarray, rows: int, length: int) -> np.ndarray:
    """`rows` windows, evenly spaced, that do not overlap.

    Raises:
      ValueError: the text is too short.
    """
    if tokens.size < rows * length:
        raise ValueError(
            f"the calibration text has {tokens.size} tokens, {rows} rows of {length}"
            f" need {rows * length}"
        )
    starts = np.linspace(0, tokens.size - length, rows).astype(np.int64)
    return np.stack([tokens[start : start + length] for start in starts])


def head(tokens: np.ndarray, count: int, length: int) -> np.ndarray:
    """The first `count` tokens, or as many as there are, in windows of `length`."""
    return tokens[: min(count, tokens.size) // length * length].reshape(-1, length)


def source(text: Text, tokenizer: Path) -> dict[str, str]:
    """Name and hash of the text and hash of the tokenizer."""
    digest = hashlib.sha256((tokenizer / "tokenizer.json").read_bytes()).hexdigest()
    return {"text": text.name, "sha256": text.sha256, "tokenizer": digest}


def write(path: Path, rows: np.ndarray, about: dict[str, str]) -> None:
    """Rows of tokens, and what they are."""
    np.savez_compressed(
        path, tokens=rows.astype(np.int32), about=np.array(json.dumps(about))
    )
    print(path, rows.shape, about)


def write_texts(given: argparse.Namespace) -> None:
    """Windows of the texts to evaluate, and of the one to calibrate on."""
    tokenizer = read_tokenizer(given.tokenizer)
    evaluated = {"pydoc": pydoc_text()}
    if given.wikitext2:
        evaluated["wikitext2"] = file_text(given.wikitext2)
    calibration = file_text(given.calibration) if given.calibration else pydoc_text()
    for stem, text in evaluated.items():
        if given.calibration and text.sha256 == calibration.sha256:
            raise ValueError(f"{text.name} would be both calibrated on and evaluated")
        rows = head(encode_text(tokenizer, text), given.tokens, given.length)
        write(given.out / f"{stem}.npz", rows, source(text, given.tokenizer))
    tokens = encode_text(tokenizer, calibration)
    if not given.calibration:
        tokens = tokens[given.tokens :]
    rows = spaced(tokens, given.rows, given.length)
    write(given.out / "calibration.npz", rows, source(calibration, given.tokenizer))


def main() -> None:
    """Write every file."""
    parser = argparse.ArgumentParser(description=__doc__)
    bundled = ROOT / "qjax/models/tiny_llama"
    parser.add_argument("--tokenizer", type=Path, default=bundled, help="a folder")
    parser.add_argument("--calibration", type=Path, help="a text file; default: pydoc")
    parser.add_argument("--wikitext2", type=Path, help="its test split as a file")
    parser.add_argument("--random", type=int, metavar="VOCABULARY", help="ids below it")
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=16384, help="evaluated of a text")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/ptq")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    if given.random is None:
        write_texts(given)
        return
    rng = np.random.default_rng(0)
    rows = rng.integers(0, given.random, (given.rows, given.length))
    about = {"text": f"uniform ids below {given.random}, seed 0"}
    write(given.out / "calibration.npz", rows, about)


if __name__ == "__main__":
    main()
