"""The least time that a step can take, from what it must do and what it was made into.

Three limits that other work can hide at best: the matrix units, memory, and the links.
`limit` is the larger of matrix units and memory, for the work that no implementation
avoids, plus the links, which wait for results and are waited for. `compiled` is the
same with the bytes that the compiler's program moves.
"""

from dataclasses import dataclass

from qjax.plan.counting import Tally
from qjax.plan.machines import Machine
from qjax.plan.traffic import Traffic


@dataclass(frozen=True)
class Times:
    """Seconds of one step on every device.

    Attributes:
      matrix: the matrix units at their peak rate.
      memory: the bytes that must be moved, at full bandwidth.
      links: the bytes sent to other devices, at full bandwidth.
      compiled_memory: the bytes that the compiled program moves.
    """

    matrix: int | float
    memory: int | float
    links: int | float
    compiled_memory: int | float

    @property
    def limit(self) -> int | float:
        """No implementation of the same sharding is faster."""
        return max(self.matrix, self.memory) + self.links

    @property
    def compiled(self) -> int | float:
        """The compiled program is not faster."""
        return max(self.matrix, self.compiled_memory) + self.links


def times(tally: Tally, moved: Traffic | None, machine: Machine) -> Times:
    """The limits of a step whose work is spread evenly over the devices."""
    chip, n = machine.chip, machine.devices
    matrix = sum(count / chip.peak(kind) for kind, count in tally.matrix.items()) / n
    memory = tally.moved / n / chip.bandwidth
    if moved is None:
        return Times(matrix, memory, 0.0, 0.0)
    links = moved.sent / chip.link if n > 1 else 0.0
    return Times(matrix, memory, links, moved.memory / chip.bandwidth)
