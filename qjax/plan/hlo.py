"""The compiler's final program, read from its text: `compiled.as_text()`."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

BITS = {"pred": 8, "bf16": 16, "token": 0, "opaque": 0}
SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^{}]*)\})?")
HEAD = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\) -> .*\{$")
LINE = re.compile(r"^\s+(?P<root>ROOT )?%?(?P<name>[\w.\-]+) = (?P<rest>.*)$")
OPERAND = re.compile(r"%([\w.\-]+)")
# What runs another computation, here or beside (on the SparseCores of a v7x), and the
# attribute that names it.
CALLS = {"call": "to_apply", "call-start": "to_apply", "async-start": "calls"}
SPACE = re.compile(r"S\((\d+)\)")


@dataclass(frozen=True)
class Shape:
    """An array: elements, bytes, and the compiler's memory space (0: the device's)."""

    count: int | float
    size: int | float
    space: int


@dataclass(frozen=True)
class Instruction:
    """One line: what it makes, from which operands, with which attributes."""

    name: str
    shapes: tuple[Shape, ...]
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    root: bool

    @property
    def size(self) -> int | float:
        """Bytes of the result, wherever it lies."""
        return sum(s.size for s in self.shapes)

    @property
    def count(self) -> int | float:
        """Elements of the result."""
        return sum(s.count for s in self.shapes)

    @property
    def in_memory(self) -> int | float:
        """Bytes of the result that lie in device memory."""
        return sum(s.size for s in self.shapes if s.space == 0)

    def called(self, attribute: str) -> str | None:
        """The computation named by an attribute."""
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.attributes)
        return found and found[1]


@dataclass
class Computation:
    """Instructions by name, in order."""

    instructions: dict[str, Instruction] = field(default_factory=dict)

    @property
    def root(self) -> Instruction:
        """The result."""
        return next(i for i in self.instructions.values() if i.root)


@dataclass
class Module:
    """A program: computations by name, and the one that runs."""

    computations: dict[str, Computation]
    entry: str

    def run(self, name: str = "", times: int | float = 1) -> Iterator[tuple]:
        """Every executed instruction with its computation and how often it runs."""
        own = self.computations[name or self.entry]
        for each in own.instructions.values():
            yield own, each, times
            if each.opcode == "while":
                body = each.called("body")
                assert body is not None
                yield from self.run(body, times * self.turns(each))
            elif each.opcode == "conditional":
                for branch in re.findall(r"%([\w.\-]+)", self._branches(each))[:1]:
                    yield from self.run(branch, times)
            elif each.opcode in CALLS and (body := each.called(CALLS[each.opcode])):
                yield from self.run(body, times)

    @staticmethod
    def _branches(each: Instruction) -> str:
        found = re.search(r"branch_computations=\{([^}]*)\}", each.attributes)
        return found[1] if found else ""

    def turns(self, loop: Instruction) -> int:
        """How often a loop runs: as the compiler says, or as its test counts.

        Raises:
          ValueError: neither tells.
        """
        known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes)
        if known:
            return int(known[1])
        test = self.computations[loop.called("condition") or ""].instructions
        limits = [
            int(found[1])
            for each in test.values()
            if each.opcode == "constant"
            and (found := re.match(r"^(\d+)\)", each.attributes))
        ]
        if len(limits) != 1:
            raise ValueError(f"how often the loop {loop.name} runs is not known")
        return limits[0]


def parse(text: str) -> Module:
    """The program in `compiled.as_text()`."""
    computations: dict[str, Computation] = {}
    entry, own = "", None
    for line in text.splitlines():
        head = HEAD.match(line)
        if head:
            own = computations[head["name"]] = Computation()
            entry = head["name"] if head["entry"] else entry
        elif own is not None and (found := LINE.match(line)):
            one = _instruction(found["name"], found["rest"], bool(found["root"]))
            own.instructions[one.name] = one
    return Module(computations, entry)


def _instruction(name: str, rest: str, root: bool) -> Instruction:
    made, rest = _split_type(rest)
    opcode, _, rest = rest.partition("(")
    inside, attributes = _split_operands(rest)
    if opcode in ("constant", "parameter"):
        attributes = f"{inside}){attributes}"
    shapes = tuple(_shape(found) for found in SHAPE.finditer(made))
    operands = tuple(OPERAND.findall(inside))
    return Instruction(name, shapes, opcode.strip(), operands, attributes, root)


def _split_type(rest: str) -> tuple[str, str]:
    if not rest.startswith("("):
        made, _, rest = rest.partition(" ")
        return made, rest
    end = _closing(rest, 0)
    return rest[: end + 1], rest[end + 2 :]


def _split_operands(rest: str) -> tuple[str, str]:
    end = _closing(f"({rest}", 0) - 1
    return rest[:end], rest[end + 1 :]


def _closing(text: str, start: int) -> int:
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    return len(text) - 1


def _shape(found: re.Match[str]) -> Shape:
    kind, sides, layout = found[1], found[2], found[3] or ""
    count = 1.0
    for side in filter(None, sides.split(",")):
        count *= int(side)
    bits = BITS.get(kind)
    if bits is None:
        digits = re.search(r"\d+", kind)
        bits = int(digits[0]) if digits else 8
    space = SPACE.search(layout)
    return Shape(count, count * bits / 8, int(space[1]) if space else 0)
