"""Which recipes suit a need: two or three, each with its reason.

The options and their ranks are a table, so that a new method is a row. A row whose
method is not in the registry is never recommended, only named as what would suit.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from qjax.methods import METHODS

Hardware = Literal["cpu", "gpu", "tpu"]
Priority = Literal["memory", "quality", "speed", "simplicity", "changing-inputs"]
SHARE_FOR_WEIGHTS = 0.8  # the rest of the memory: activations, KV cache, buffers
MOST = 3


@dataclass(frozen=True)
class Needs:
    """What a user has and wants.

    `memory_gb`: limit on the memory the model runs in (10^9 bytes; None: no limit),
    which needs `weights`, how many would be quantized; `kept`: how many would stay in
    16 bits (embeddings, head, norms). `calibration`: sample
    inputs are at hand. `training`: gradient steps are allowed. `hardware` and
    `priority` are one of `Hardware` and `Priority`.
    """

    memory_gb: int | float | None = None
    weights: int | None = None
    kept: int = 0
    calibration: bool = False
    training: bool = False
    hardware: str = "gpu"
    priority: str = "quality"

    def __post_init__(self):
        for name, known in (("hardware", Hardware), ("priority", Priority)):
            if getattr(self, name) not in get_args(known):
                choices = ", ".join(get_args(known))
                raise ValueError(
                    f"{name} {getattr(self, name)!r} is unknown: choose from {choices}"
                )
        if self.memory_gb is not None and not 0 < self.memory_gb < float("inf"):
            raise ValueError(
                f"memory is {self.memory_gb} GB: it must be above 0 and finite"
            )
        if self.weights is not None and self.weights < 0:
            raise ValueError(f"weights is {self.weights}: it must not be negative")
        if self.memory_gb is not None and not self.weights:
            raise ValueError(
                "a memory limit needs the model's size: give a model or its parameters"
            )

    @property
    def bits(self) -> float:
        """Bits per weight that fit the memory limit (infinite without one)."""
        if self.memory_gb is None or self.weights is None:
            return float("inf")
        room = 8e9 * SHARE_FOR_WEIGHTS * self.memory_gb - 16 * self.kept
        return max(0.0, room / self.weights)


@dataclass(frozen=True)
class Option:
    """A recipe as a choice: `bits` per weight with overhead, ranks from 0 to 10.

    `quality` and `speed` on a CPU follow what `qjax compare` measures on a 7M Llama
    (XLA's CPU int8 by int8 product is slower than float); the rest are judgements.

    `name`: the short name of `qjax.catalogue`; `speed`: by hardware; `inputs`: how
    little it depends on what the inputs look like; `wants`: what it cannot do without.
    """

    name: str
    method: str
    bits: int | float
    quality: int
    simplicity: int
    inputs: int
    speed: dict[str, int]
    reason: str
    wants: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Advice:
    """One recommendation."""

    name: str
    bits: int | float
    reason: str


def _speed(cpu: int, gpu: int, tpu: int) -> dict[str, int]:
    return {"cpu": cpu, "gpu": gpu, "tpu": tpu}


_DATA = frozenset({"calibration"})
_TRAIN = frozenset({"training"})
OPTIONS: tuple[Option, ...] = (
    Option(
        "hqq-int8-g128", "HQQ", 8.25, 10, 6, 10, _speed(5, 4, 4),
        "as near to full precision as plain int8, with fitted float zero points",
    ),
    Option(
        "rtn-int8-g128", "RTN", 8.19, 10, 10, 10, _speed(6, 5, 5),
        "one rounding per weight; at 8 bits the loss is hard to measure",
    ),
    Option(
        "fp8a16", "RTN", 8.01, 8, 9, 10, _speed(7, 6, 5),
        "one scale per output column, a cast to decode",
    ),
    Option(
        "W8A8", "RTN", 8.01, 9, 8, 6, _speed(1, 8, 9),
        "int8 by int8 matrix units; activation ranges are taken from each token",
    ),
    Option(
        "FP8_DYNAMIC", "RTN", 8.01, 7, 8, 7, _speed(2, 9, 7),
        "fp8 by fp8 matrix units (Hopper and newer); ranges are taken from each token",
    ),
    Option(
        "hqq-int4-g64", "HQQ", 4.5, 6, 6, 9, _speed(5, 7, 7),
        "float zero points fitted to the weights alone: good int4 without data",
    ),
    Option(
        "nf4", "RTN", 4.25, 5, 8, 9, _speed(5, 5, 4),
        "levels for normally distributed weights, the base of QLoRA fine-tuning",
    ),
    Option(
        "nvfp4a16", "RTN", 4.5, 5, 8, 9, _speed(5, 8, 4),
        "small blocks of 16 with fp8 scales, native on Blackwell",
    ),
    Option(
        "W4A16", "RTN", 4.13, 4, 9, 9, _speed(6, 8, 7),
        "plain rounding to int4 in groups of 128, the layout most kernels read",
    ),
    Option(
        "hqq-int3-g64", "HQQ", 3.5, 3, 5, 8, _speed(4, 5, 4),
        "3 bits with fitted float zero points: a clear loss",
    ),
    Option(
        "hqq-int2-g64", "HQQ", 2.5, 1, 5, 7, _speed(4, 5, 4),
        "the smallest; expect a large loss, so compare first",
    ),
    Option(
        "gptq-int4-g128", "GPTQ", 4.16, 8, 4, 5, _speed(6, 8, 7),
        "corrects each column's error with the inputs' second moments", _DATA,
    ),
    Option(
        "awq-int4-g128", "AWQ", 4.16, 8, 4, 6, _speed(6, 8, 7),
        "scales up the channels that large inputs meet", _DATA,
    ),
    Option(
        "smoothquant-W8A8", "SmoothQuant", 8.01, 8, 5, 5, _speed(8, 8, 9),
        "moves activation outliers into the weights before int8 by int8", _DATA,
    ),
    Option(
        "qat-int4-g128", "QAT", 4.16, 9, 1, 6, _speed(6, 8, 7),
        "trains through the rounding: the best at low bits, the most work", _TRAIN,
    ),
)  # fmt: skip


def choose(needs: Needs, options: Sequence[Option] = OPTIONS) -> list[Advice]:
    """Two or three recipes of the registry for these needs, the best first.

    Raises:
        ValueError: nothing fits the memory limit; the message says how far off it is.
    """
    here = {method.__name__ for method in METHODS}
    runnable = [option for option in options if option.method in here]
    suited = _suited(needs, runnable)
    if not suited:
        least = min(option.bits for option in runnable)
        raise ValueError(
            f"{needs.memory_gb:g} GB leave {needs.bits:.2f} bits per weight for "
            f"{needs.weights:,} weights, and the smallest recipe takes {least}: "
            "a smaller model or more memory is needed"
        )
    best = sorted(suited, key=lambda option: _order(needs, option))[:MOST]
    return [Advice(o.name, o.bits, _why(needs, o)) for o in best]


def would_suit(needs: Needs, options: Sequence[Option] = OPTIONS) -> list[Advice]:
    """What else would suit, by methods that this version does not have."""
    here = {method.__name__ for method in METHODS}
    absent = [option for option in options if option.method not in here]
    suited = sorted(_suited(needs, absent), key=lambda option: _order(needs, option))
    return [Advice(o.method, o.bits, o.reason) for o in suited]


def _suited(needs: Needs, options: Iterable[Option]) -> list[Option]:
    have = {name for name in ("calibration", "training") if getattr(needs, name)}
    return [o for o in options if o.bits <= needs.bits and o.wants <= have]


def _order(needs: Needs, option: Option) -> tuple[int | float, ...]:
    """Sort key: the priority first, then quality, then fewer bits."""
    rank = {
        # A memory limit is met already; below it, 4 bits is where quality still holds.
        "memory": 10 * (option.quality >= 4) - option.bits,
        "quality": option.quality,
        "speed": option.speed[needs.hardware],
        "simplicity": option.simplicity,
        "changing-inputs": option.inputs,
    }[needs.priority]
    return (-rank, -option.quality, option.bits)


def _why(needs: Needs, option: Option) -> str:
    """The reason, with what the memory limit makes of it."""
    if needs.memory_gb is None or needs.weights is None:
        return option.reason
    size = (option.bits * needs.weights + 16 * needs.kept) / 8e9
    return f"{option.reason}; weights take {size:.2f} of {needs.memory_gb:g} GB"
