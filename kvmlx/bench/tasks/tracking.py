"""Variable tracking: a chain of assignments in noise, and which variables have the first one's value.

RULER, 2404.06654: one chain of four hops, five variables of five letters, a worked example before the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from string import ascii_uppercase

from kvmlx.bench.tasks import words
from kvmlx.bench.tasks.base import N_DEPTHS, Draw, Plan
from kvmlx.bench.tasks.haystack import NOISE, hidden, noise
from kvmlx.bench.types import Question

HOPS = 4
MAX_TOKENS = 30
INTRODUCTION = (
    "Variables are assigned in the text below, some of them the value of another variable. "
    "Keep track of which variables have which value."
)
EXAMPLE = "This is an example of such a text, with its question and its answer."
AFTER = "This is the text that you will be asked about."


def plan(draw: Draw) -> Plan:
    """Plan a sample; its units are sentences of noise."""
    theirs = words.distinct(lambda: words.letters(draw.rng, ascii_uppercase, 3), HOPS + 1)
    names = words.distinct(lambda: words.letters(draw.rng, ascii_uppercase, 5), HOPS + 1)
    their_value, value = words.distinct(lambda: words.number(draw.rng, 5), 2)
    question, example = _question(names, value), _question(theirs, their_value)
    at = range(0, N_DEPTHS, N_DEPTHS // (HOPS + 1))
    shown = "\n".join(
        (
            hidden(NOISE, _chain(theirs, their_value), at, "\n"),
            example.text,
            f"{example.prefix} {', '.join(theirs)}",
        )
    )
    depths = sorted(int(d) for d in draw.rng.choice(N_DEPTHS, HOPS + 1, replace=False))

    def write(units: int, filling: int) -> str:
        lines = noise(units)
        if len(lines) <= HOPS + 1:
            lines = [NOISE[i % len(NOISE)] for i in range(units)]
        text = hidden(lines, _chain(names, value), depths, "\n")
        return "\n\n".join((INTRODUCTION, EXAMPLE, shown, AFTER, text))

    return Plan((question,), write, least=HOPS + 2)


def _chain(names: Sequence[str], value: str) -> list[str]:
    hops = [f"VAR {name} = VAR {before}" for before, name in pairwise(names)]
    return [f"VAR {names[0]} = {value}", *hops]


def _question(names: Sequence[str], value: str) -> Question:
    return Question(
        text=f"Question: Which variables have the value {value} in the text above?",
        answers=tuple(names),
        prefix=f"Answer: In the text above, {len(names)} variables have the value {value}. They are:",
        max_tokens=MAX_TOKENS,
    )
