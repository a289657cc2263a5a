"""The names of tensors in Hugging Face checkpoints and the leaves they become."""

from collections.abc import Iterable
from typing import NamedTuple


class Name(NamedTuple):
    """One row: a checkpoint's tensor and a leaf's path.

    `{layer}` and `{expert}` stand for every index. A tensor per expert becomes one
    slice of a leaf with a leading expert axis; so does a tensor per layer when the
    model's layers are scanned, and the path then has no layer number.

    Attributes:
      hf: the tensor's name in the checkpoint.
      path: the leaf's path in a model with unrolled layers.
      transpose: torch keeps a linear's weight as `[out, in]`, Flax as `[in, out]`.
    """

    hf: str
    path: str
    transpose: bool = False


def linear_names(hf: str, path: str, bias: bool) -> list[Name]:
    """The rows of a torch linear layer."""
    rows = [Name(f"{hf}.weight", f"{path}/kernel", transpose=True)]
    return [*rows, Name(f"{hf}.bias", f"{path}/bias")] if bias else rows


def norm_names(hf: str, path: str) -> list[Name]:
    """The rows of a torch layer norm."""
    return [Name(f"{hf}.weight", f"{path}/scale"), Name(f"{hf}.bias", f"{path}/bias")]


def spellings(hf: str, prefix: str) -> Iterable[str]:
    """Names under which checkpoints keep a tensor, the usual one first.

    Checkpoints of a bare model lack the head model's prefix (`transformer.`), and the
    oldest ones of BERT call a norm's weight gamma and its bias beta.
    """
    bare = hf.removeprefix(prefix)
    for name in (hf, bare, prefix + bare):
        yield name
        if "LayerNorm" in name:
            old = name.replace("LayerNorm.weight", "LayerNorm.gamma")
            yield old.replace("LayerNorm.bias", "LayerNorm.beta")
