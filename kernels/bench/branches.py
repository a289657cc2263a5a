"""Bundles of a kernel's steps, from the words that libtpu prints.

Counting all branches is too much where a kernel has one body for the last step of a
sum and another for the others. Which branches exclude each other is not printed; so of
those beside each other only the longest is counted, which is never too many for a step
that takes it.

Kernels that quantize tokens do so in the first step of a block of them and keep the
codes. Such a branch takes reciprocals. It is not counted in later steps where it does
nothing else (no product), or where a branch beside it has the products without them.
"""

import re

WORD = re.compile(r"\s*(0x[0-9a-f]+|0)\s.*?:")
JUMP = re.compile(r"sbr\.rel[^;{}]*target = \$region(\d+)")
START = re.compile(r"(?:Start region|Start/End empty region) (\d+)")
RECIPROCAL, PRODUCT = "vrcp", "vmatmul"

Branch = tuple[int, int]
"""The words that a jump passes over."""


def longest(text: str) -> tuple[int, ...]:
    """Bundles of the longest branches, in a first step of tokens and in a later one."""
    words = of(text)
    ahead, stop = jumps(words), len(words)
    return tuple(
        _longest(0, stop, ahead, skipped) for skipped in ([], coding(words, ahead))
    )


def together(text: str) -> tuple[int, ...]:
    """The same with all branches that a step may take."""
    words = of(text)
    gone = outermost(coding(words, jumps(words)))
    return len(words), len(words) - sum(b - a for a, b in gone)


def of(text: str) -> list[str]:
    """The words of a schedule."""
    return [line for line in text.splitlines() if WORD.match(line)]


def jumps(words: list[str]) -> list[Branch]:
    """From and to where each jump ahead goes; back is a loop."""
    starts: dict[str, int] = {}
    for at, word in enumerate(words):
        for region in START.findall(word):
            starts.setdefault(region, at)
    found = ((at, JUMP.search(word)) for at, word in enumerate(words))
    ahead = ((at, starts.get(jump[1], at)) for at, jump in found if jump)
    return [(at, to) for at, to in ahead if to > at]


def coding(words: list[str], ahead: list[Branch]) -> list[Branch]:
    """Branches that a step takes for the sake of new tokens' codes."""

    def has(what: str, branch: Branch) -> bool:
        return any(what in word for word in words[slice(*branch)])

    plain = [b for b in ahead if has(PRODUCT, b) and not has(RECIPROCAL, b)]
    return [
        branch
        for branch in ahead
        if has(RECIPROCAL, branch)
        and (
            not has(PRODUCT, branch)
            or any(_beside(branch, other, ahead) for other in plain)
        )
    ]


def outermost(branches: list[Branch]) -> list[Branch]:
    """Those that lie in no other."""
    return [b for b in branches if not any(_within(b, other) for other in branches)]


def _within(inner: Branch, outer: Branch) -> bool:
    return inner != outer and outer[0] <= inner[0] and inner[1] <= outer[1]


def _beside(one: Branch, other: Branch, ahead: list[Branch]) -> bool:
    """Whether neither lies in the other, and every third branch holds both or none."""
    apart = one[1] <= other[0] or other[1] <= one[0]
    around = [[b for b in ahead if _within(x, b)] for x in (one, other)]
    return apart and around[0] == around[1]


def _longest(first: int, stop: int, ahead: list[Branch], skipped: list[Branch]) -> int:
    """Bundles between two words, of branches beside each other the longest."""
    inside = [(a, b) for a, b in ahead if first <= a and b <= stop]
    always, branches, at = stop - first, [0], first
    for a, b in sorted(inside):
        if a < at:
            continue  # within the branch before, which counts it
        rest = [pair for pair in inside if pair != (a, b)]
        if (a, b) not in skipped:
            branches.append(_longest(a, b, rest, skipped))
        always, at = always - (b - a), b
    return always + max(branches)
