"""What is trained quantized, how, and what training keeps beside the parameters."""

from dataclasses import dataclass
from typing import Any

from qjax.core.layout import Layout
from qjax.core.pytrees import register
from qjax.methods.base import check_patterns
from qjax.train.dorefa import DoReFaGradients
from qjax.train.quantizers import InputQuantizer, WeightQuantizer


@dataclass(frozen=True)
class QAT:
    """One step of a recipe for training: how weights and activations are quantized.

    Args:
      weights: a method for weights, such as `LSQ(4)`.
      activations: a method for activations, such as `PACT(4)`; None: float.
      gradients: a method for the gradients of what sites give out, `DoReFaGradients()`;
        they are quantized where `f_qat` is given a key. None: float.
      targets: patterns of the sites to take; None takes all but the head, routers and
        embeddings.
      ignore: patterns of the sites to leave.

    Raises:
      TypeError: a field is no method for what it is given for.
    """

    weights: Any
    activations: Any = None
    targets: str | tuple[str, ...] | None = None
    ignore: str | tuple[str, ...] = ()
    gradients: Any = None

    def __post_init__(self):
        check_patterns("QAT", self.targets, self.ignore)
        if not isinstance(self.weights, WeightQuantizer):
            raise TypeError(
                f"QAT.weights must be a method for weights such as LSQ(4), got "
                f"{self.weights!r}"
            )
        own = self.activations
        if own is not None and not isinstance(own, InputQuantizer):
            raise TypeError(
                "QAT.activations must be a method for activations such as PACT(4), or "
                f"None, got {own!r}"
            )
        if self.gradients is not None and not isinstance(
            self.gradients, DoReFaGradients
        ):
            raise TypeError(
                "QAT.gradients must be DoReFaGradients(...) or None, got "
                f"{self.gradients!r}"
            )
        # A method that does not fit its role says so when asked for its format.
        _ = self.weights.weight_format
        _ = None if own is None else own.activation


@dataclass(frozen=True)
class Plan:
    """A leaf that is trained quantized.

    Attributes:
      path: the leaf's path.
      layout, shape, dtype: of the leaf.
      step: its methods.
      kinds: of its sites, by number.
      together: paths of the leaves that share what `WeightQuantizer.shared` says, this
        one included.
    """

    path: str
    layout: Layout
    shape: tuple[int, ...]
    dtype: Any
    step: QAT
    kinds: tuple[str, ...]
    together: tuple[str, ...]

    @property
    def layers(self) -> tuple[int, ...]:
        """Leading axes that are layers."""
        return self.shape[: len(self.shape) - len(self.layout.roles)]

    def lead(self, kind: str) -> tuple[int, ...]:
        """Leading axes of what is known of the input of a site of this kind."""
        if kind == "ragged_dot":  # tokens of all experts in one matrix
            return self.layers
        own = len(self.layers)
        return self.layers + tuple(self.shape[own + i] for i in self.layout.axes("b"))

    def blocks(self) -> int:
        """Blocks of features with a range of their own."""
        assert self.step.activations is not None
        format = self.step.activations.activation.format
        return format.granularity.counts(self.layout.K, 1)[0]


@dataclass(frozen=True)
class QState:
    """What training keeps beside the parameters. A pytree.

    Attributes:
      trained: by path, `weights` and, for each site, `inputs`: step sizes, clips. Give
        it to the optimiser beside the parameters.
      observed: the number of steps, and the observed ranges of each site by path.
      plans: static; how each leaf is quantized.
    """

    trained: dict[str, Any]
    observed: dict[str, Any]
    plans: tuple[Plan, ...]


register(QState, ("trained", "observed"), ("plans",))
