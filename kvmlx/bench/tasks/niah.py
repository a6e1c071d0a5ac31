"""Needles in a haystack: keys with values, hidden in noise, in prose or among others of their kind.

RULER, 2404.06654: how many keys, values and queries a task has, what they are made of, and where they go.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from kvmlx.bench.tasks import words
from kvmlx.bench.tasks.base import Draw, Plan
from kvmlx.bench.tasks.haystack import Prose, hidden, noise
from kvmlx.bench.types import Question

MAX_TOKENS = 128
Kind = Literal["word", "number", "uuid"]
MAKE: dict[Kind, Callable[[np.random.Generator], str]] = {
    "word": words.key,
    "number": words.number,
    "uuid": words.uuid4,
}


@dataclass(frozen=True, slots=True)
class Needles:
    """A task's parameters; called, it plans a sample."""

    haystack: Literal["noise", "prose", "needles"] = "prose"
    key: Kind = "word"
    value: Kind = "number"
    keys: int = 1
    values: int = 1
    """Of each key."""
    queries: int = 1
    """Keys asked for in one question."""

    def __call__(self, draw: Draw) -> Plan:
        # The shortest needle has more than four tokens.
        others = draw.length // 4 if self.haystack == "needles" else 0
        keys = words.distinct(lambda: MAKE[self.key](draw.rng), self.keys + others)
        values = words.distinct(lambda: MAKE[self.value](draw.rng), self.keys * self.values + others)
        own = [values[i * self.values : (i + 1) * self.values] for i in range(self.keys)]
        needles = [self._needle(k, v) for k, row in zip(keys, own, strict=False) for v in row]
        lines = [self._needle(k, v) for k, v in zip(keys[self.keys :], values[self.keys * self.values :], strict=True)]
        depths = draw.depths(len(needles))
        question = self._question(keys[: self.queries], [v for row in own[: self.queries] for v in row])
        prose = Prose(draw.rng)

        def write(units: int, filling: int) -> str:
            pieces, between = {
                "noise": lambda: (noise(units), "\n"),
                "prose": lambda: (prose.sentences(units), " "),
                "needles": lambda: (lines[:units], "\n"),
            }[self.haystack]()
            filled = "".join(f"{line}\n" for line in noise(filling))
            return f"{self._introduction()}\n\n{filled}{hidden(pieces, needles, depths, between)}"

        return Plan((question,), write, fills=self.haystack == "needles")

    def _introduction(self) -> str:
        if self.keys * self.values == 1 and self.haystack != "needles":
            return (
                f"A special magic {self.value} is hidden somewhere in the text below. "
                "Remember it, since you will be asked for it afterwards."
            )
        return (
            f"Special magic {self.value}s are hidden in the text below. "
            "Remember them, since you will be asked for some of them afterwards."
        )

    def _needle(self, key: str, value: str) -> str:
        if self.values == 1:
            return f"The special magic {self.value} for {key} is: {value}."
        return f"One of the special magic {self.value}s for {key} is: {value}."

    def _question(self, keys: Sequence[str], answers: Sequence[str]) -> Question:
        which = keys[0] if len(keys) == 1 else f"{', '.join(keys[:-1])} and {keys[-1]}"
        several = len(answers) > 1
        what = f"special magic {self.value}{'s' if several else ''} for {which} mentioned in the provided text"
        return Question(
            text=f"What {'are all the' if several else 'is the'} {what}?",
            answers=tuple(answers),
            prefix=f"The {what} {'are' if several else 'is'}",
            max_tokens=MAX_TOKENS,
        )
