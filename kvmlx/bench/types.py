"""What the parts of the benchmark hand to each other: samples, runs, records, and the engine that drives a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

Mode = Literal["agnostic", "aware"]
"""Whether the context is compressed before the question is known, or with the question at its end."""


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked about a context."""

    text: str
    answers: tuple[str, ...]
    prefix: str = ""
    """How the answer begins; handed to the model as the beginning of its own words."""
    max_tokens: int = 128
    metric: str = "all"
    """How a response is scored: a name of `tasks.scores.METRICS`, which has RULER's and LongBench's."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One context, with everything that is asked about it."""

    task: str
    index: int
    """Which of the task's samples of this length; with the run's seed it determines the sample."""
    length: int
    """Tokens asked for: of the whole prompt with its longest question."""
    context: str
    questions: tuple[Question, ...]
    depths: tuple[float, ...] = ()
    """Where in the context each question's answer is, 0 to 1; empty where it has no one place."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A sample's tokens, divided where the context ends; the same for every method."""

    context: tuple[int, ...]
    """The chat template's beginning and the context."""
    question: tuple[int, ...]
    """The question, the template's end, and the answer's prefix."""


State = Any
"""An engine's caches of one context, filled; only the engine looks inside."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What one method took at one context length and batch size. Missing numbers are None, never guessed."""

    nbytes: int
    """What the caches say they hold."""
    held_bytes: int | None
    """What the allocator says they hold; None where it cannot tell."""
    full_nbytes: int
    """A full cache of the same tokens in 16 bits."""
    peak_bytes: int | None
    """The most that was held during prefill beyond the weights."""
    ttft_s: tuple[float, ...]
    """Time to the first token: prefill, compression and one step; one number a repetition."""
    step_s: tuple[float, ...]
    """Times of single decoding steps, in order."""


class Engine(Protocol):
    """One loaded model, driven as the benchmark does; `kvmlx.backends.mlx.bench` and `.torch.bench` have it.

    A method is the text of a strategy, or of a framework's own cache (`kvmlx.bench.baselines`).
    """

    name: str
    """``"mlx"`` or ``"torch"``."""
    device: str
    dtype: str
    tokenizer: Any

    def check(self, method: str) -> None:
        """Raise StrategyError or UnsupportedModelError unless the method can be run on this model."""
        ...

    def acts_at_end(self, method: str) -> bool:
        """Whether the method acts on a complete context only, so that `compress` can make it of a recorded one."""
        ...

    def record(self, tokens: Sequence[int], methods: Sequence[str]) -> State:
        """Prefill once, uncompressed, and note what these methods (all `acts_at_end`) need to act on it."""
        ...

    def compress(self, recorded: State, method: str) -> State:
        """Return the method's caches of a recorded context, compressed; the record stays as it was."""
        ...

    def prefill(self, tokens: Sequence[int], method: str) -> State:
        """Prefill from nothing through the method's own caches, in chunks, and complete it as `compress` does."""
        ...

    def answer(self, state: State, tokens: Sequence[int], max_tokens: int) -> list[int]:
        """Feed a question's tokens, none of which makes the method select again, and go on greedily.

        The state is used up. Stops before an end token, which is not returned.
        """
        ...

    def answers(
        self, state: State, questions: Sequence[Sequence[int]], max_tokens: Sequence[int]
    ) -> Iterator[list[int]]:
        """Answer several questions as `answer` does, each on a copy of one state, which is used up."""
        ...

    def forced(self, state: State, tokens: Sequence[int]) -> Iterator[np.ndarray]:
        """Feed tokens one at a time; give after each the log-probabilities of the next, float32 ``[vocabulary]``.

        The state is used up.
        """
        ...

    def sizes(self, state: State) -> tuple[int, int]:
        """Return the bytes that the caches hold, and those of a full 16-bit cache of the same tokens."""
        ...

    def cost(self, tokens: Sequence[int], method: str, *, batch: int, steps: int, repeats: int) -> Cost:
        """Prefill ``batch`` equal sequences from nothing and decode ``steps`` tokens of each, ``repeats`` times."""
        ...

    def allocated_bytes(self) -> int | None:
        """Return what the framework's allocator holds now, after letting go of what it can; None: it cannot tell."""
        ...
