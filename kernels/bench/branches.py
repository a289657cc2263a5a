"""Bundles on one way through a kernel, from the words that libtpu prints.

Counting all branches is too much where a kernel has one body for the last step of a
sum and another for the others. Which branches exclude each other is not printed; so of
those beside each other only the longest is counted, which is never too many.
"""

import re

WORD = re.compile(r"\s*(0x[0-9a-f]+|0)\s.*?:")
JUMP = re.compile(r"sbr\.rel[^;{}]*target = \$region(\d+)")
START = re.compile(r"(?:Start region|Start/End empty region) (\d+)")


def longest(text: str) -> int:
    """Bundles of the longest branch at each depth, with what is always executed."""
    words = [line for line in text.splitlines() if WORD.match(line)]
    return _longest(0, len(words), jumps(words))


def jumps(words: list[str]) -> list[tuple[int, int]]:
    """From and to where each jump ahead goes; back is a loop."""
    starts: dict[str, int] = {}
    for at, word in enumerate(words):
        for region in START.findall(word):
            starts.setdefault(region, at)
    found = ((at, JUMP.search(word)) for at, word in enumerate(words))
    ahead = ((at, starts.get(jump[1], at)) for at, jump in found if jump)
    return [(at, to) for at, to in ahead if to > at]


def _longest(first: int, stop: int, ahead: list[tuple[int, int]]) -> int:
    """The same between two words."""
    inside = [(a, b) for a, b in ahead if first <= a and b <= stop]
    always, branches, at = stop - first, [0], first
    for a, b in sorted(inside):
        if a < at:
            continue  # within the branch before, which counts it
        rest = [pair for pair in inside if pair != (a, b)]
        branches.append(_longest(a, b, rest))
        always, at = always - (b - a), b
    return always + max(branches)
