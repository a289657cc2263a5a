"""Text to tokens for `train_tiny.py`."""

import dataclasses
import gzip
from pathlib import Path

import numpy as np
from rich.progress import track
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

VOCABULARY = 4096


def read_documents(path: Path, separator: str) -> list[str]:
    """The documents of a text file, plain or gzipped."""
    data = path.read_bytes()
    text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
    return [part.strip("\n") for part in text.split(f"{separator}\n") if part.strip()]


def load_tokenizer(
    folder: Path | None, text: Path, out: Path, separator: str
) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder`, or one trained on the text and kept in `out`."""
    kept = out / "tokenizer"
    if folder is not None or kept.exists():
        return AutoTokenizer.from_pretrained(folder or kept)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[separator],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(iter(read_documents(text, separator)), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=separator, eos_token=separator
    )
    tokenizer.save_pretrained(kept)
    return tokenizer


def tokenise(
    tokenizer: PreTrainedTokenizerBase,
    text: Path,
    out: Path,
    separator: str,
    validation: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids for training and for validation; computed once, kept in `out`."""
    paths = (out / "train.npy", out / "validation.npy")
    if not all(path.exists() for path in paths):
        documents = read_documents(text, separator)
        end = tokenizer.convert_tokens_to_ids(separator)
        ids = [
            np.array([*tokenizer.encode(document), end], np.uint16)
            for document in track(documents, "tokenising")
        ]
        cut = len(ids) - max(1, round(len(ids) * validation))
        for path, part in zip(paths, (ids[:cut], ids[cut:]), strict=True):
            np.save(path, np.concatenate(part))
    return np.load(paths[0]), np.load(paths[1])


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Batches of `batch_tokens // length` blocks, a new order and offset each pass."""

    ids: np.ndarray
    length: int
    batch_tokens: int
    seed: int

    def batch(self, step: int) -> np.ndarray:
        """The blocks of this step, `[batch_tokens // length, length]`."""
        rows = self.batch_tokens // self.length
        steps = (len(self.ids) // self.length - 1) // rows
        epoch, index = divmod(step, steps)
        rng = np.random.default_rng((self.seed, epoch))
        offset = rng.integers(self.length)
        order = rng.permutation(steps * rows)[index * rows : (index + 1) * rows]
        starts = offset + order * self.length
        return np.stack([self.ids[at : at + self.length] for at in starts])
