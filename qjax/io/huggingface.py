"""Models from Hugging Face folders and the hub, without torch."""

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
)

from qjax.core.lazy import LazyLeaf
from qjax.io.named import is_conv1d
from qjax.io.quantized import (
    QuantizedModules,
    QuantizedSource,
    Reader,
    float_dtype,
    reader_of,
    reader_of_names,
)
from qjax.io.shards import Tensor, open_shards, read_json
from qjax.io.suitable import (
    check_config,
    check_dtypes,
    check_no_code,
    warn_of_unread,
)
from qjax.models import Function, architecture, functional
from qjax.models.fields import Fields
from qjax.models.names import Name, spellings
from qjax.trace.paths import flatten_with_paths

Sharding = jax.sharding.Sharding | Callable[[str, tuple[int, ...]], Any] | None

_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def load_model(
    path_or_id: str | Path,
    *,
    dtype: Any = None,
    scan_layers: bool = False,
    sharding: Sharding = None,
    lazy: bool = False,
) -> tuple[Function, dict[str, Any], Any, Any]:
    """A model's function and parameters, its tokenizer and its configuration.

    Weights that compressed-tensors, GPTQ, AWQ, bitsandbytes or HQQ stored in low bits
    become QTensors with the same codes and scales; run them with `qjax.apply(f)`.

    Args:
      path_or_id: a folder with `config.json` and safetensors, or the id of a
        repository on the hub.
      dtype: of floating-point parameters; None keeps the checkpoint's. Of quantized
        leaves, what they stand for; codes and scales stay as stored.
      scan_layers: whether equal leaves of all layers are stacked, `[L, ...]`, and the
        layers run by `lax.scan`.
      sharding: of every leaf, or a function `(path, shape) -> sharding`; a device reads
        only its own slices. None: the default device.
      lazy: whether float leaves stay on disk, as `LazyLeaf`.

    Returns:
      `(f, params, tokenizer, config)`: `f(params, tokens)`, a nested dict, what
      `transformers.AutoTokenizer` makes of the folder (None if it holds no tokenizer),
      and the configuration of the model's file in `qjax.models`.

    Raises:
      FileNotFoundError: the folder, the repository or a file is missing.
      ValueError: the model, or an option of its quantization, is not supported, or a
        file is damaged; in one sentence.

    Warns:
      QuantizationWarning: the checkpoint holds tensors that the model has no place for.
    """
    folder = find_folder(path_or_id)
    f, params, config = load_weights(folder, dtype, scan_layers, sharding, lazy)
    return f, params, read_tokenizer(folder), config


def load_weights(
    folder: Path,
    dtype: Any = None,
    scan_layers: bool = False,
    sharding: Sharding = None,
    lazy: bool = False,
) -> tuple[Function, dict[str, Any], Any]:
    """`(f, params, config)` as from `load_model`; reads no tokenizer."""
    raw = read_json(folder / "config.json")
    reader = reader_of(raw)
    check_config(raw, folder, quantized=reader is not None)
    module, config = read_config(folder)
    if getattr(reader, "coded_cache", False):
        config = with_coded_cache(config, folder)
    f, shapes = _abstract(module, config, scan_layers)
    tensors = open_shards(folder)
    quantized = QuantizedModules.of(reader or reader_of_names(tensors), tensors)
    sources = find_sources(
        module, config, tensors, shapes, scan_layers, folder, quantized
    )
    in_float = [s for s in sources.values() if isinstance(s, Source)]
    wanted = [tensor for source in in_float for tensor in source.tensors]
    check_dtypes(wanted)
    whole = dtype or float_dtype(raw, wanted)

    def leaf(path: Any, _: Any) -> Any:
        source = sources["/".join(key.key for key in path)]
        if isinstance(source, QuantizedSource):
            return source.place(whole, sharding)
        return _leaf(source, dtype, sharding, lazy)

    params = jax.tree_util.tree_map_with_path(leaf, shapes)
    read = {tensor.name for tensor in wanted}
    for source in sources.values():
        if isinstance(source, QuantizedSource):
            read |= {name for take in source.takes for name in take.used}
    warn_of_unread(tensors, read, config, raw)
    return f, params, config


def load_shell(
    folder: Path, scan_layers: bool = False, coded_cache: bool = False
) -> tuple[Function, Any]:
    """`(f, config)` as from `load_model`; needs and reads no weights."""
    module, config = read_config(folder)
    config = with_coded_cache(config, folder) if coded_cache else config
    return _abstract(module, config, scan_layers)[0], config


def leaf_shapes(module: ModuleType, config: Any) -> dict[str, tuple[int, ...]]:
    """The shape of every leaf of a model with unrolled layers, by its path."""
    return _by_path(_abstract(module, config, scan_layers=False)[1])


def _by_path(shapes: Any) -> dict[str, tuple[int, ...]]:
    return {path: leaf.shape for path, leaf in flatten_with_paths(shapes)}


def find_folder(path_or_id: str | Path) -> Path:
    """The folder of a model, downloaded (or found in the cache) if it is a hub id.

    Raises:
      FileNotFoundError: there is neither such a folder nor such a repository.
    """
    folder = Path(path_or_id).expanduser()
    if folder.is_dir():
        return folder
    try:
        return Path(snapshot_download(str(path_or_id), allow_patterns=_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"{path_or_id} is no folder, and no model could be had from the hub: "
            f"{reason}"
        ) from None


def read_config(folder: Path) -> tuple[ModuleType, Any]:
    """The architecture's module and the configuration in `config.json`.

    Raises:
      FileNotFoundError, ValueError: the file is missing, damaged, of a model that is
        not supported, or has a field of a wrong type or value.
    """
    raw = read_json(folder / "config.json")
    check_no_code(raw, folder)
    kind = Fields(raw).raw.get("model_type")
    module = architecture(kind if isinstance(kind, str) else str(kind))
    return module, module.from_fields(Fields(raw))


def with_coded_cache(config: Any, folder: Path) -> Any:
    """The configuration of the model whose layers hold scales for keys and values.

    Raises:
      ValueError: models of this type cannot.
    """
    if not hasattr(config, "coded_cache"):
        raise ValueError(
            f"{folder}: keys and values of this model_type cannot be coded; those of "
            "Llama and its kind can"
        )
    return dataclasses.replace(config, coded_cache=True)


def read_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer, or None if it holds none.

    Raises:
      ValueError: it is damaged.
    """
    found = [name for name in _TOKENIZERS if (folder / name).exists()]
    if not found:
        return None
    # Here, because importing transformers takes seconds and few uses need it.
    from transformers import AutoTokenizer  # noqa: PLC0415

    try:
        # Else it asks on the terminal whether to run the folder's own Python code.
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Warning:  # where the user turns warnings into errors
        raise
    # A damaged file gives KeyError, TypeError or, from Rust, Exception itself.
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(
            f"{folder / found[0]} is not a tokenizer that can be read ({reason})"
        ) from error


def _abstract(
    module: ModuleType, config: Any, scan_layers: bool
) -> tuple[Function, Any]:
    """The function, and shapes in place of parameters."""

    def make():
        return module.build(config, rngs=nnx.Rngs(0), scan_layers=scan_layers)

    f, shapes = functional(nnx.eval_shape(make))
    if not hasattr(config, "coded_cache"):
        return f, shapes
    coded = dataclasses.replace(config, coded_cache=True)

    def with_coded_cache() -> Function:
        return _abstract(module, coded, scan_layers)[0]

    return dataclasses.replace(f, with_coded_cache=with_coded_cache), shapes


@dataclasses.dataclass(frozen=True)
class Source:
    """A leaf in the checkpoint: tensors of equal shape, in the order they are stacked.

    Attributes:
      tensors: one, or `prod(lead)` of them.
      lead: the stacked axes, layers before experts.
      transpose: whether the last two axes are swapped on read.
    """

    path: str
    tensors: tuple[Tensor, ...]
    lead: tuple[int, ...]
    transpose: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """The leaf's shape."""
        shape = self.tensors[0].shape
        return (*self.lead, *(shape[::-1] if self.transpose else shape))

    def read(self, dtype: Any, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """The slice `index` of the leaf, copied out of the files."""
        index = (slice(None),) * len(self.shape) if index is None else index
        outer, inner = index[: len(self.lead)], index[len(self.lead) :]
        grid = np.arange(len(self.tensors)).reshape(self.lead)[outer]
        views = [self._view(self.tensors[i])[inner] for i in grid.reshape(-1)]
        out = np.empty((len(views), *views[0].shape), dtype)
        for i, view in enumerate(views):
            out[i] = view
        return out.reshape(*grid.shape, *out.shape[1:])

    def _view(self, tensor: Tensor) -> np.ndarray:
        view = tensor.view()
        return view.T if self.transpose else view


def find_sources(
    module: ModuleType,
    config: Any,
    tensors: dict[str, Tensor],
    shapes: Any,
    scan_layers: bool,
    folder: Path,
    quantized: QuantizedModules | None = None,
) -> "dict[str, Source | QuantizedSource]":
    """For every leaf, where it is in the checkpoint.

    Raises:
      ValueError: a tensor is missing or has a wrong shape.
    """
    expected, sources = _by_path(shapes), {}
    for name in module.names(config):
        for source in _expand(
            name, config, tensors, module, scan_layers, expected, quantized
        ):
            sources[source.path] = source
    for path, shape in expected.items():
        if path not in sources:
            raise ValueError(f"{folder} has no tensor for {path}")
        if isinstance(sources[path], Source):
            _check_shape(sources[path], shape)
    return sources


def _expand(name, config, tensors, module, scan_layers, expected, quantized):
    """The sources of one row of the table, one per layer unless scanned."""
    layers = range(config.layers) if "{layer}" in name.path else range(1)
    experts = range(config.experts) if "{expert}" in name.hf else range(1)
    stacked = scan_layers and "{layer}" in name.path
    for group in [layers] if stacked else [[layer] for layer in layers]:
        path = name.path.replace("/{layer}", "") if stacked else name.path
        path = path.format(layer=group[0])
        if path not in expected:
            continue
        numbers = list(itertools.product(group, experts))
        lead = (len(group),) if stacked else ()
        lead += (len(experts),) if "{expert}" in name.hf else ()
        if quantized is not None and _may_be_quantized(name, quantized.reader):
            names = (_modules(name, module.PREFIX, i, e) for i, e in numbers)
            takes = quantized.takes(path, names)
            if takes:
                yield QuantizedSource(
                    path,
                    takes,
                    lead,
                    int("{expert}" in name.hf),
                    expected[path],
                    quantized.reader,
                )
                continue
        found = tuple(_find(name, tensors, module.PREFIX, i, e) for i, e in numbers)
        yield Source(path, found, lead, name.transpose)


def _may_be_quantized(name: Name, reader: Reader) -> bool:
    if is_conv1d(name.hf, name.path, name.transpose):
        return getattr(reader, "conv1d", False)
    return name.transpose and name.hf.endswith(".weight")


def _modules(name: Name, prefix: str, layer: int, expert: int) -> list[str]:
    """The names under which checkpoints keep the module of a weight."""
    wanted = name.hf.format(layer=layer, expert=expert)
    return [each.removesuffix(".weight") for each in spellings(wanted, prefix)]


def _find(
    name: Name, tensors: dict[str, Tensor], prefix: str, layer: int, expert: int
) -> Tensor:
    wanted = name.hf.format(layer=layer, expert=expert)
    for spelling in spellings(wanted, prefix):
        if spelling in tensors:
            return tensors[spelling]
    raise ValueError(f"the checkpoint has no tensor {wanted}")


def _check_shape(source: Source, shape: tuple[int, ...]) -> None:
    inner = shape[len(source.lead) :]
    inner = inner[::-1] if source.transpose else inner
    for tensor in source.tensors:
        if tensor.shape != inner:
            raise ValueError(
                f"{tensor.path}: {tensor.name} has shape {list(tensor.shape)}, "
                f"config.json asks for {list(inner)}"
            )


def _leaf(source: Source, dtype: Any, sharding: Sharding, lazy: bool) -> Any:
    stored = source.tensors[0].dtype
    floating = jnp.issubdtype(stored, jnp.floating)
    dtype = jnp.dtype(dtype if dtype is not None and floating else stored)

    def read() -> jax.Array:
        if sharding is None:
            return jnp.asarray(source.read(dtype))
        place = sharding
        if not isinstance(place, jax.sharding.Sharding):
            place = place(source.path, source.shape)
        return jax.make_array_from_callback(
            source.shape, place, lambda index: source.read(dtype, index)
        )

    def read_layer(layer: int) -> jax.Array:
        return jnp.asarray(source.read(dtype, (slice(layer, layer + 1),))[0])

    if not lazy:
        return read()
    apart = bool(source.lead) and sharding is None
    stamp = "; ".join(tensor.stamp for tensor in source.tensors)
    return LazyLeaf(source.shape, dtype, read, read_layer if apart else None, stamp)
