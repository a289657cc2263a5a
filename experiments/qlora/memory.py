"""Peak memory of a training step of QLoRA and of LoRA, compiled for a TPU without one.

    pip install libtpu==0.0.42.1
    python experiments/qlora/memory.py

Shapes alone, no weights: XLA's own account of the compiled step (`memory_analysis`),
beside a budget of what must be alive. Writes `results/memory.jsonl` and `.png` anew.
"""

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import jax
import jax.numpy as jnp
import optax
import tyro
from flax import nnx
from jax.experimental import topologies
from matplotlib.figure import Figure

import qjax
from qjax.core.coded import encode
from qjax.core.layout import Layout
from qjax.core.qtensor import QTensor
from qjax.models import functional, llama, rope
from qjax.results import Record, append, environment, read
from qjax.schemes import scheme
from qjax.train.step import TrainState, begin, next_token_loss, training_step

HERE = Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Options:
    """What to compile."""

    batch: int = 1
    """Sequences; 1 of 512 tokens is what the paper's figure 6 has."""
    length: int = 512
    """Tokens in a sequence."""
    rank: int = 16
    """Rank of the adapters."""
    layers: int = 16
    """Layers of Llama 3.2 1B."""
    topology: str = "v5e:2x2"
    """Of the TPU; the step runs on one of its chips."""
    out: Path = HERE / "results" / "memory.jsonl"
    """Where the rows go."""


def llama_1b(layers: int) -> llama.Config:
    """Llama 3.2 1B."""
    return llama.Config(
        vocabulary=128_256,
        features=2048,
        mlp_features=8192,
        layers=layers,
        heads=32,
        kv_heads=8,
        head_dim=64,
        context=8192,
        epsilon=1e-5,
        rope=rope.plain(64, 500_000.0),
        tied=True,
        windows=(None,) * layers,
    )


def parameters(config: llama.Config, name: str | None) -> tuple[Any, Any]:
    """The model's function and the shapes of its frozen parameters."""

    def make() -> nnx.Module:
        options = {"dtype": jnp.bfloat16, "scan_layers": True, "remat": True}
        return llama.build(config, rngs=nnx.Rngs(0), **options)

    f, params = functional(nnx.eval_shape(make))
    if name is None:
        return f, params

    def leaf(path: Any, w: Any) -> Any:
        if w.ndim < 3:
            return w
        layout = Layout("kn", w.shape[-2:])
        code = lambda w: QTensor.of(encode(w, scheme(name).weights), layout, w.dtype)
        return jax.eval_shape(code, w)

    return f, jax.tree_util.tree_map_with_path(leaf, params)


def training(f: Any, params: Any, options: Options) -> tuple[Any, Any]:
    """The step, and the shapes of its arguments."""
    tokens = jax.ShapeDtypeStruct((options.batch, options.length), jnp.int32)
    optimiser = optax.adamw(1e-4)
    transformed = []

    def start(params: Any, key: Any) -> TrainState:
        f_lora, adapters = qjax.lora(
            f, params, options.rank, example=(tokens,), key=key
        )
        transformed.append(f_lora)
        return begin(adapters, optimiser)

    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(start, params, key)

    def loss(own: Any, carried: Any, tokens: Any, key: Any, frozen: Any) -> Any:
        logits = transformed[0](own, frozen, tokens, key=key)
        return next_token_loss(logits, tokens), carried

    batches = jax.ShapeDtypeStruct((1, *tokens.shape), jnp.int32)
    return training_step(loss, optimiser), (state, batches, key, params)


def compiled(step: Any, arguments: Any, topology: str) -> Any:
    """The step on one chip, its state given away."""
    found = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    chip = jax.sharding.SingleDeviceSharding(found.devices[0])

    def placed(x: Any) -> Any:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=chip)

    arguments = jax.tree.map(placed, arguments)
    return jax.jit(step, donate_argnums=0).trace(*arguments).lower().compile()


def size(tree: Any) -> int:
    """Bytes of arrays."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def peak(program: Any) -> dict[str, int]:
    """XLA's account, in bytes."""
    found = program.memory_analysis()
    parts = {
        "arguments": found.argument_size_in_bytes,
        "outputs": found.output_size_in_bytes,
        "aliased": found.alias_size_in_bytes,
        "temporaries": found.temp_size_in_bytes,
    }
    return parts | {
        "peak": sum(parts.values()) - 2 * parts["aliased"],
    }


def budget(config: llama.Config, arguments: Any, options: Options) -> dict[str, int]:
    """What must be alive when the backward pass begins and ends, in bytes.

    Logits are there in float32 beside their gradient, which meets the head in bfloat16.
    """
    state, _, _, params = arguments
    tokens = options.batch * options.length
    adapters = size(state.trained)
    bfloat16 = 2
    return {
        "frozen linears": size(params["layers"]),
        "float embedding": size(params["embed"]) + size(params["norm"]),
        "adapters": adapters,
        "optimiser": size(state.optimiser),
        "gradients": 2 * adapters,  # of this batch, and the sum over batches
        "layer inputs": config.layers * tokens * config.features * bfloat16,
        "logits": tokens * config.vocabulary * (4 + bfloat16),
    }


def main(options: Options) -> None:
    """Compile both steps, and write rows and picture."""
    config = llama_1b(options.layers)
    rows = []
    for label, name in (("QLoRA NF4", "NF4_DQ"), ("LoRA bfloat16", None)):
        f, params = parameters(config, name)
        step, arguments = training(f, params, options)
        program = compiled(step, arguments, options.topology)
        account, planned = peak(program), budget(config, arguments, options)
        total = sum(planned.values())
        metrics = {
            "peak_gb": account["peak"] / 1e9,
            "budget_gb": total / 1e9,
            "peak_of_budget": account["peak"] / total,
            **{f"xla {k}": v / 1e9 for k, v in account.items()},
            **{f"{k.replace(' ', '_')}_gb": v / 1e9 for k, v in planned.items()},
        }
        print(label, json.dumps(metrics, indent=1))
        about = dataclasses.asdict(options) | {"out": options.out.name}
        context = environment() | {"device": f"tpu {options.topology}, ahead of time"}
        rows.append(Record(label, about, metrics, context))
    options.out.unlink(missing_ok=True)
    for row in rows:
        append(options.out, row)
    draw(options.out)


def draw(path: Path) -> None:
    """The parts of each budget beside the peak, as bars."""
    records = read(path)
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.subplots()
    parts = [
        key
        for key in records[0].metrics
        if key.endswith("_gb") and key not in ("peak_gb", "budget_gb")
    ]
    left = [0.0] * len(records)
    places = [2 * i for i in range(len(records))]
    for part in parts:
        values = [row.metrics[part] for row in records]
        label = part.removesuffix("_gb").replace("_", " ")
        axes.barh(places, values, left=left, label=label)
        left = [a + b for a, b in zip(left, values)]
    peaks = [row.metrics["peak_gb"] for row in records]
    axes.barh([i + 0.8 for i in places], peaks, color="0.3", label="compiled step")
    axes.set_yticks([i + 0.4 for i in places], [row.label for row in records])
    axes.set(xlabel="GB", title="A training step of a 1B Llama")
    axes.legend(fontsize="small", ncols=2)
    figure.savefig(path.with_suffix(".png"), dpi=120)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
