"""What every task is: samples made of a seed, of a prompt that is as long as asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from kvmlx.bench.tasks.prompts import Chat, Context, prompt_tokens
from kvmlx.bench.types import Question, Sample
from kvmlx.types import KVMLXError

N_DEPTHS = 40
"""Places that a needle can have, evenly from a context's beginning to its end (RULER, 2404.06654)."""
DEPTH_STEP = 23
"""From one sample's depth to the next one's: any few samples are spread well, 40 of them have all depths."""


class Task(Protocol):
    """Something to ask a model about long contexts."""

    @property
    def name(self) -> str: ...
    @property
    def description(self) -> str: ...
    @property
    def count(self) -> int | None:
        """How many samples there are; None: as many as one likes."""
        ...

    def make(self, index: int, length: int, seed: int, tokenizer: Any) -> Sample:
        """Return a sample, the same for the same task, index, length, seed and tokenizer.

        Args:
            index: which sample.
            length: tokens of the whole prompt with the longest question. A generated prompt is at most 2% shorter.
            seed: of the run.
            tokenizer: mlx-lm's or one of transformers.

        Raises:
            KVMLXError: the task needs more tokens, or has no such sample.
        """
        ...


@dataclass(frozen=True, slots=True)
class Draw:
    """What a sample's chance is drawn from."""

    rng: np.random.Generator
    length: int
    depth: int
    """Where in ``range(N_DEPTHS)`` what is asked for goes."""

    def depths(self, count: int) -> list[int]:
        """Return different depths, this sample's own first, the others by chance."""
        others = [d for d in range(N_DEPTHS) if d != self.depth]
        return [self.depth, *(int(d) for d in self.rng.choice(others, count - 1, replace=False))]


@dataclass(frozen=True, slots=True)
class Plan:
    """A sample before its length is known."""

    questions: tuple[Question, ...]
    write: Callable[[int, int], Context]
    """Make a context of so many units, and of so much filling, sentences or words, where units are long.

    More of either gives a longer context with the same facts in it.
    """
    least: int = 1
    """Fewest units."""
    fills: bool = False
    """Whether `write` makes use of filling."""


@dataclass(frozen=True, slots=True)
class Generated:
    """A task whose samples are made up."""

    name: str
    description: str
    plan: Callable[[Draw], Plan]
    count: None = None

    def make(self, index: int, length: int, seed: int, tokenizer: Any) -> Sample:
        plan = self.plan(draw(self.name, index, length, seed))
        context = self._fit(plan, length, tokenizer)
        text = context if isinstance(context, str) else "\n\n".join(context)
        depths = _depths(text, plan.questions)
        if isinstance(context, str):
            return Sample(self.name, index, length, text, plan.questions, depths)
        return Chat(self.name, index, length, text, plan.questions, depths, turns=context)

    def _fit(self, plan: Plan, length: int, tokenizer: Any) -> Context:
        """Return the longest context that leaves room for the longest question."""

        def tokens(units: int, filling: int = 0) -> int:
            return prompt_tokens(plan.write(units, filling), plan.questions, tokenizer)

        least = tokens(plan.least)
        if least > length:
            raise KVMLXError(
                f"{self.name} needs a prompt of at least {least} tokens with this tokenizer, got {length}: "
                "give a greater length, or leave the task out"
            )
        units = largest(tokens, plan.least, least, length)
        filling = largest(lambda n: tokens(units, n), 0, tokens(units), length) if plan.fills else 0
        return plan.write(units, filling)


def draw(name: str, index: int, length: int, seed: int) -> Draw:
    """Return the chance of one sample; that of another task, index, length or seed is independent of it."""
    first = _rng(name, length, seed).integers(N_DEPTHS)
    return Draw(_rng(name, length, seed, index), length, int(first + DEPTH_STEP * index) % N_DEPTHS)


def largest(size: Callable[[int], int], low: int, low_size: int, limit: int) -> int:
    """Return the greatest n >= ``low`` with ``size(n) <= limit``, for a size that grows with n.

    Interpolates, since sizes are nearly straight in n; halves the interval where that does not help.
    """
    step = max(1, (limit - low_size) // 64)
    while (high_size := size(high := low + step)) <= limit:
        assert high_size > low_size or step <= limit, "more units must give more tokens"
        slope = (high_size - low_size) / step
        step = int(1.02 * (limit - high_size) / slope) + 1 if slope > 0 else 2 * step
        low, low_size = high, high_size
    halve = False
    while high - low > 1:
        share = 0.5 if halve else (limit - low_size) / (high_size - low_size)
        middle = min(high - 1, max(low + 1, low + int(share * (high - low))))
        if (middle_size := size(middle)) <= limit:
            halve, low, low_size = middle - low < (high - low) // 2, middle, middle_size
        else:
            halve, high, high_size = high - middle < (high - low) // 2, middle, middle_size
    return low


def _rng(*of: Any) -> np.random.Generator:
    digest = hashlib.sha256("\0".join(map(str, of)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest, "little"))


def _depths(text: str, questions: tuple[Question, ...]) -> tuple[float, ...]:
    """Return where each question's answer is; nothing where some question has several, or one that is not written."""
    if any(len(q.answers) != 1 or text.count(q.answers[0]) != 1 for q in questions):
        return ()
    return tuple(text.index(q.answers[0]) / len(text) for q in questions)
