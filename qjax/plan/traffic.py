"""Bytes that the compiled program moves, on each device: through memory and links."""

import re
from dataclasses import dataclass

from qjax.plan.hlo import Computation, Instruction, Module

FREE = frozenset(
    {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while"}
    | {"conditional", "call", "partition-id", "replica-id", "after-all", "iota"}
    | {"opt-barrier", "call-start", "async-start", "async-update"}
)
RINGS = {
    # What each device sends for a result of one byte, among n devices in a ring.
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: n - 1,
    "all-to-all": lambda n: (n - 1) / n,
    "ragged-all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1.0,
    "collective-broadcast": lambda n: 1.0,
}


@dataclass(frozen=True)
class Traffic:
    """Of one device and one run of the program.

    Attributes:
      memory: bytes read from and written to device memory; values that the compiler
        placed beside the units are not in it.
      sent: bytes sent over links, by algorithms that use every device once (rings).
      collectives: how many operations over devices run.
    """

    memory: int | float
    sent: int | float
    collectives: int


def traffic(module: Module, devices: int) -> Traffic:
    """What a compiled program moves."""
    memory, sent, collectives = 0.0, 0.0, 0.0
    for own, each, times in module.run():
        kind = each.opcode.removesuffix("-start")
        memory += times * _moved(module, own, each)
        if kind in RINGS:
            size = _result(each)
            sent += times * size * RINGS[kind](_group(each, devices))
            collectives += times
    return Traffic(memory, sent, int(collectives))


def _result(each: Instruction) -> int | float:
    """Bytes of what a collective makes; a started one lists its operands first."""
    if not each.opcode.endswith("-start") or len(each.shapes) < 2:
        return each.size
    if each.opcode.startswith("all-reduce"):
        return each.size  # its result has the shape of the operand, listed once
    return each.shapes[1].size


def _group(each: Instruction, devices: int) -> int:
    """How many devices take part."""
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", each.attributes)
    if listed:
        return listed[1].count(",") + 1
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]", each.attributes)
    if iota:
        return int(iota[2])
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", each.attributes)
    if mesh:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        count = 1
        for axis in re.findall(r"'(\w+)'", mesh[2]):
            count *= int(sizes[axis])
        return count
    return devices


def _moved(module: Module, own: Computation, each: Instruction) -> int | float:
    """Bytes of device memory that one instruction reads and writes."""
    kind = each.opcode
    if kind in FREE or kind.endswith("-done"):
        return 0.0
    operands = [own.instructions[name] for name in each.operands]
    if kind == "fusion":
        return _fused(module, each, operands)
    if kind in ("dynamic-slice", "slice", "gather"):
        return (each.size if operands[0].in_memory else 0.0) + each.in_memory
    if kind in ("slice-start", "dynamic-slice-start"):
        source, made = each.shapes[:2]
        return sum(made.size for s in (source, made) if s.space == 0)
    if kind == "dynamic-update-slice":
        update = operands[1]
        return update.in_memory + (update.size if each.in_memory else 0.0)
    if kind == "copy-start":
        made, source = each.shapes[:2]
        return sum(s.size for s in (made, source) if s.space == 0)
    if kind.endswith("-start"):
        return sum(o.in_memory for o in operands) + each.in_memory / 2
    return sum(o.in_memory for o in operands) + each.in_memory


def _fused(
    module: Module, each: Instruction, operands: list[Instruction]
) -> int | float:
    """A fusion reads the slices that it takes and writes what it updates."""
    name = each.called("calls")
    if name is None or name not in module.computations:
        return sum(o.in_memory for o in operands) + each.in_memory
    inner = module.computations[name]
    total = 0.0
    for i, operand in enumerate(operands):
        if operand.in_memory:
            total += operand.size * _share(module, inner, _parameter(inner, i))
    return total + _written(inner, each)


def _parameter(inner: Computation, index: int) -> str:
    """The name of a computation's parameter."""
    return next(
        one.name
        for one in inner.instructions.values()
        if one.opcode == "parameter" and one.attributes.split(")")[0] == str(index)
    )


def _share(module: Module, inner: Computation, name: str) -> int | float:
    """The part of a value that a fused computation needs, between 0 and 1.

    Slices need their part, whatever takes all elements of a slice needs no more.
    """
    own = inner.instructions[name]
    if own.root:
        return 1.0
    total = 0.0
    for user in inner.instructions.values():
        if name not in user.operands:
            continue
        first = user.operands[0] == name
        if user.opcode in ("dynamic-slice", "slice", "gather"):
            part = user.count / own.count if first else 0.0
        elif user.opcode == "dynamic-update-slice" and first:
            part = 0.0
        elif user.opcode == "fusion" and (called := user.called("calls")):
            nested = module.computations[called]
            place = _parameter(nested, user.operands.index(name))
            part = _share(module, nested, place)
        else:
            part = 1.0
        after = _share(module, inner, user.name) if user.count == own.count else 1.0
        total += part * after
    return min(total, 1.0)


def _written(inner: Computation, each: Instruction) -> int | float:
    """Bytes that a fusion writes: of what is updated in place, the update."""
    roots = [inner.root]
    if roots[0].opcode == "tuple":
        roots = [inner.instructions[name] for name in roots[0].operands]
    total = 0.0
    for root, shape in zip(roots, each.shapes):
        if shape.space != 0:
            continue
        while root.opcode == "bitcast":
            root = inner.instructions[root.operands[0]]
        updated = root.opcode == "dynamic-update-slice"
        total += inner.instructions[root.operands[1]].size if updated else shape.size
    return total
