"""The contexts of one task: made, prefilled once, and compressed by every method from that."""

from __future__ import annotations

from collections.abc import Sequence

from kvmlx.bench.records import FULL
from kvmlx.bench.tasks import Task, prompt_of
from kvmlx.bench.types import Engine, Mode, Prompt, Sample, State

HELD_BYTES = 2 << 30
"""Prefilled contexts of one task are kept up to this size until every method had its turn."""


class Contexts:
    """One task's samples at one length.

    Args:
        engine: the model.
        task: whose samples.
        length: tokens of a prompt.
        mode: ``agnostic``: methods compress the context; ``aware``: context and question, but for the last token.
        seed: of the samples.
        methods: all that may be asked for, except those of other processes.
    """

    def __init__(self, engine: Engine, task: Task, length: int, mode: Mode, seed: int, methods: Sequence[str]) -> None:
        self.engine, self.task, self.length, self.mode, self.seed = engine, task, length, mode, seed
        self.at_end = [FULL, *(m for m in methods if m != FULL and engine.acts_at_end(m))]
        self._samples: dict[int, Sample] = {}
        self._prompts: dict[tuple[int, int], Prompt] = {}
        self._recorded: dict[tuple[int, int], State] = {}
        self._held_bytes = 0

    def sample(self, index: int) -> Sample:
        """Return the sample of this number."""
        if index not in self._samples:
            self._samples[index] = self.task.make(index, self.length, self.seed, self.engine.tokenizer)
        return self._samples[index]

    def prompt(self, index: int, question: int) -> Prompt:
        """Return what methods compress, and what follows it."""
        at = (index, question)
        if at not in self._prompts:
            sample = self.sample(index)
            prompt = prompt_of(sample, sample.questions[question], self.engine.tokenizer)
            whole = (*prompt.context, *prompt.question)
            self._prompts[at] = prompt if self.mode == "agnostic" else Prompt(whole[:-1], whole[-1:])
        return self._prompts[at]

    def compressed(self, index: int, question: int, method: str) -> State:
        """Return a method's caches of what it compresses."""
        context = self.prompt(index, question).context
        if method not in self.at_end:
            return self.engine.prefill(context, method)
        at = (index, question if self.mode == "aware" else 0)
        recorded = self._recorded.get(at)
        if recorded is None:
            recorded = self.engine.record(context, self.at_end)
            nbytes = self.engine.sizes(recorded)[0]
            if self._held_bytes + nbytes <= HELD_BYTES:
                self._recorded[at] = recorded
                self._held_bytes += nbytes
        return self.engine.compress(recorded, method)

    def forget(self, index: int) -> None:
        """Let go of what is held of a sample: every method had its turn."""
        for at in [at for at in self._recorded if at[0] == index]:
            self._held_bytes -= self.engine.sizes(self._recorded.pop(at))[0]
