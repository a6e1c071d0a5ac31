"""Run a benchmark: every method over the same contexts, each result written down as soon as it is known."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

from kvmlx.bench import matching
from kvmlx.bench.config import ALWAYS, Config
from kvmlx.bench.contexts import Contexts
from kvmlx.bench.kvpress import Kvpress, Press
from kvmlx.bench.records import FULL, Costs, Fidelity, ResultsFile, Score, Skip, Subject, key
from kvmlx.bench.summary import INFORMATIVE
from kvmlx.bench.tasks import Task, score, tasks_of
from kvmlx.bench.tasks.haystack import prose
from kvmlx.bench.types import Engine, Question, State
from kvmlx.types import KVMLXError

FULL_SUBJECT = Subject(FULL, FULL, None, 1.0)

Step = Callable[[str, int, int], None]
"""Told of each piece of work before it begins: a description, how many are done, of how many."""


@dataclass(frozen=True, slots=True)
class Entry:
    """What is compared with the full cache: a family at a target, or a method as it is written."""

    family: str
    target: float | None


def entries(config: Config) -> list[Entry]:
    """Return all that take part, baselines included, in order, each once."""
    out: dict[Entry, None] = {}
    for text in (*ALWAYS, *config.strategies, *config.presses):
        if _is_family(text):
            for budget in config.budgets:
                fixed = str(Press.parse(text).at(budget)) if Kvpress.owns(text) else matching.with_budget(text, budget)
                out[Entry(fixed, None)] = None
            for target in config.match_bytes:
                out[Entry(text, target)] = None
        elif text != FULL:
            out[Entry(text, None)] = None
    return list(out)


def _is_family(text: str) -> bool:
    """Whether a method's budget is left open."""
    if Kvpress.owns(text):
        return Press.parse(text).budget is None
    return matching.has_budget(text) and matching.family_of(text) == text


class Runner:
    """One model under one config.

    Args:
        config: what to run.
        engine: the loaded model.
        model_config: the model's config.json.
        file: where results go; what is in it already is not run again.
        presses: kvpress in its own process, if the config has it.
        on_step: see `Step`.
    """

    def __init__(
        self,
        config: Config,
        engine: Engine,
        model_config: Mapping[str, Any],
        file: ResultsFile,
        presses: Kvpress | None = None,
        on_step: Step = lambda what, done, total: None,
    ) -> None:
        self.config, self.engine, self.model_config = config, engine, model_config
        self.file, self.presses, self.on_step = file, presses, on_step
        self.tasks = tasks_of(config.tasks, text=config.text, questions=config.questions)
        self.subjects = {length: self._take_part(length) for length in config.lengths}
        """Who takes part, by length."""
        samples = sum(self._samples(task) for task in self.tasks)
        scores = len(config.modes) * samples * ("scores" in config.measures)
        texts = config.fidelity_texts * ("fidelity" in config.measures)
        costs = len(config.batches) * ("costs" in config.measures)
        self.done = 0
        self.total = sum(1 + len(subjects) for subjects in self.subjects.values()) * (scores + texts + costs)

    def run(self) -> None:
        """Do all that is not in the file yet."""
        config = self.config
        for length in config.lengths:
            if "scores" in config.measures:
                for mode in config.modes:
                    for task in self.tasks:
                        self._scores(task, length, mode)
            if "fidelity" in config.measures:
                for text in range(config.fidelity_texts):
                    self._fidelity(length, text)
            if "costs" in config.measures:
                for batch in config.batches:
                    self._costs(length, batch)
        self.on_step("done", self.total, self.total)

    # -- who takes part -------------------------------------------------------------------------------------------

    def _take_part(self, length: int) -> list[Subject]:
        """Return the methods at this length, budgets tuned; why others cannot take part is written down."""
        out = []
        for entry in entries(self.config):
            try:
                out.append(self._subject(entry, length))
            except KVMLXError as error:
                nobody = Subject(entry.family, entry.family, entry.target, 1.0)
                self._skip(Skip(nobody, "all", length, str(error)))
        return out

    def _subject(self, entry: Entry, length: int) -> Subject:
        if Kvpress.owns(entry.family):
            if self.presses is None:
                raise KVMLXError(
                    f"{entry.family} needs --kvpress PYTHON, the interpreter of an environment with kvpress"
                )
            return self.presses.subject(entry.family, entry.target, length)
        if entry.target is None:
            self.engine.check(entry.family)
            ratio = matching.ratio_of(entry.family, length, self.model_config)
            return Subject(entry.family, entry.family, None, ratio)
        text, ratio = matching.match(entry.family, entry.target, length, self.model_config)
        self.engine.check(text)
        return Subject(text, entry.family, entry.target, ratio)

    def _skip(self, record: Skip) -> None:
        if self._missing(Skip, record.subject, *record.place):
            self.file.add(record)

    def _missing(self, kind: type[Any], subject: Subject, *place: Any) -> bool:
        return key(kind, subject, *place) not in self.file.done

    def _step(self, what: str) -> None:
        self.on_step(what, self.done, self.total)
        self.done += 1

    def _samples(self, task: Task) -> int:
        return min(self.config.samples, task.count or self.config.samples)

    # -- scores ---------------------------------------------------------------------------------------------------

    def _scores(self, task: Task, length: int, mode: Any) -> None:
        """Ask everything of one task: the full cache first, which tells whether the others are worth asking."""
        config = self.config
        subjects = self.subjects[length]
        ours = [s.method for s in subjects if not Kvpress.owns(s.method)]
        contexts = Contexts(self.engine, task, length, mode, config.seed, ours)
        samples = range(self._samples(task))
        try:
            for index in samples:
                contexts.sample(index)
        except KVMLXError as error:
            self._skip(Skip(FULL_SUBJECT, f"score {mode} {task.name}", length, str(error)))
            self.done += len(samples) * (1 + len(subjects))
            return
        for index in samples:
            self._step(f"{task.name} {length} {mode}: {FULL}")
            self._ask(contexts, index, FULL_SUBJECT)
        place = (mode, task.name, length)
        mine = [
            r.score for r in self.file.records if type(r) is Score and r.subject.method == FULL and r.place[:3] == place
        ]
        if np.mean(mine) < INFORMATIVE and not config.everything:
            reason = f"the full cache scores {np.mean(mine):.2f}, below {INFORMATIVE}: not informative on this model"
            self._skip(Skip(FULL_SUBJECT, f"score {mode} {task.name}", length, reason))
            self.done += len(samples) * len(subjects)
            return
        for index in samples:
            for subject in subjects:
                self._step(f"{task.name} {length} {mode}: {subject.method}")
                self._ask(contexts, index, subject)
            contexts.forget(index)

    def _ask(self, contexts: Contexts, index: int, subject: Subject) -> None:
        """Ask a sample's questions that were not asked yet."""
        sample = contexts.sample(index)
        place = (contexts.mode, sample.task, sample.length, index)
        missing = [i for i in range(len(sample.questions)) if self._missing(Score, subject, *place, i)]
        if not missing:
            return
        try:
            answers = self._answers(contexts, index, subject.method, missing)
        except KVMLXError as error:
            if not Kvpress.owns(subject.method):
                raise
            self._skip(Skip(subject, f"score {contexts.mode} {sample.task}", sample.length, str(error)))
            return
        for i, tokens in zip(missing, answers, strict=True):
            question = sample.questions[i]
            response = self.engine.tokenizer.decode(tokens)
            depth = sample.depths[i] if sample.depths else None
            points = score(response, question)
            self.file.add(Score(subject, *place[:3], index, i, depth, points, response, question.answers))

    def _answers(self, contexts: Contexts, index: int, method: str, missing: Sequence[int]) -> Iterable[list[int]]:
        """Return the answers to the missing questions, in order."""
        prompts = [contexts.prompt(index, i) for i in range(len(contexts.sample(index).questions))]
        most = [self._most(q) for q in contexts.sample(index).questions]
        if Kvpress.owns(method):
            assert self.presses is not None
            return list(self.presses.answers(method, [prompts[i] for i in missing], [most[i] for i in missing]))
        if contexts.mode == "aware":
            asked = ((contexts.compressed(index, i, method), prompts[i].question, most[i]) for i in missing)
            return (self.engine.answer(*each) for each in asked)
        # All of them, those that are there already too: who decodes together decides how sums are rounded.
        answers = self.engine.answers(contexts.compressed(index, 0, method), [p.question for p in prompts], most)
        return (tokens for i, tokens in enumerate(answers) if i in missing)

    def _most(self, question: Question) -> int:
        return min(question.max_tokens, self.config.max_tokens)

    # -- fidelity -------------------------------------------------------------------------------------------------

    def _fidelity(self, length: int, text: int) -> None:
        """Feed a text's next tokens through every method's cache of its beginning."""
        missing = [s for s in self.subjects[length] if self._missing(Fidelity, s, length, text)]
        self._step(f"fidelity {length}: {FULL}")
        self.done += len(self.subjects[length]) - len(missing)
        if not missing:
            return
        tokens = self._prose(length + self.config.fidelity_tokens, text)
        prefix, fed, scored = tokens[: length - 1], tokens[length - 1 : -1], tokens[length:]
        at_end = [s.method for s in missing if not Kvpress.owns(s.method) and self.engine.acts_at_end(s.method)]
        recorded = self.engine.record(prefix, [FULL, *at_end])
        full = np.stack(list(self.engine.forced(self.engine.compress(recorded, FULL), fed)))
        for subject in missing:
            self._step(f"fidelity {length}: {subject.method}")
            if Kvpress.owns(subject.method):
                assert self.presses is not None
                try:
                    numbers: Any = self.presses.fidelity(subject.method, prefix, fed, scored)
                except KVMLXError as error:
                    self._skip(Skip(subject, "fidelity", length, str(error)))
                    continue
            else:
                other = self._forced(recorded, subject.method, at_end, prefix, fed)
                if np.array_equal(full, other) and subject.ratio < 1:
                    raise KVMLXError(f"{subject.method} changed nothing at all: its cache was not used, which is a bug")
                numbers = drift(full, other, scored)
            self.file.add(Fidelity(subject, length, text, *map(digits, numbers)))

    def _forced(
        self, recorded: State, method: str, at_end: Sequence[str], prefix: Sequence[int], fed: Sequence[int]
    ) -> np.ndarray:
        engine = self.engine
        state = engine.compress(recorded, method) if method in at_end else engine.prefill(prefix, method)
        return np.stack(list(engine.forced(state, fed)))

    def _prose(self, n: int, text: int) -> list[int]:
        """Return n tokens of prose; texts 0, 1, ... lie one after the other."""
        tokens = self._prose_tokens
        if (text + 1) * n > len(tokens):
            raise KVMLXError(
                f"fidelity and costs need {text + 1} texts of {n} tokens; the prose in kvmlx has {len(tokens)}: "
                "lower lengths, fidelity_texts or fidelity_tokens"
            )
        return tokens[text * n : (text + 1) * n]

    @cached_property
    def _prose_tokens(self) -> list[int]:
        # A paragraph at a time: tokenizers warn of texts that are longer than their model takes.
        encode = self.engine.tokenizer.encode
        return [int(t) for p in prose().split("\n\n") for t in encode(p.strip() + "\n\n", add_special_tokens=False)]

    # -- costs ----------------------------------------------------------------------------------------------------

    def _costs(self, length: int, batch: int) -> None:
        tokens = self._prose(length, 0)
        for subject in (FULL_SUBJECT, *self.subjects[length]):
            self._step(f"costs {length}, batch {batch}: {subject.method}")
            source: Any = self.engine
            if Kvpress.owns(subject.method):
                source = self.presses
                if self.engine.name != "torch":
                    reason = f"times of PyTorch do not compare with those of {self.engine.name}: use --backend torch"
                    self._skip(Skip(subject, "cost", length, reason))
                    continue
            if self._missing(Costs, subject, length, batch):
                cost = source.cost(
                    tokens, subject.method, batch=batch, steps=self.config.steps, repeats=self.config.repeats
                )
                self.file.add(Costs(subject=subject, length=length, batch=batch, **asdict(cost)))


def drift(full: np.ndarray, other: np.ndarray, scored: Sequence[int]) -> tuple[tuple[Any, ...], ...]:
    """Return KL(full || other), flips, and both negative log-likelihoods of ``scored``, a number a token.

    Args:
        full, other: log-probabilities ``[tokens, vocabulary]``, float32.
        scored: the text's own next tokens.
    """
    p, q = (_normalized(x.astype(np.float64)) for x in (full, other))
    kl = (np.exp(p) * (p - q)).sum(axis=1)
    rows = np.arange(len(scored))
    return (
        tuple(kl.tolist()),
        tuple((p.argmax(axis=1) != q.argmax(axis=1)).tolist()),
        tuple((-q[rows, list(scored)]).tolist()),
        tuple((-p[rows, list(scored)]).tolist()),
    )


def digits(numbers: Sequence[Any]) -> tuple[Any, ...]:
    """Return numbers as they are written: six digits, a third of the file that all would take."""
    return tuple(n if isinstance(n, bool) else float(f"{n:.6g}") for n in numbers)


def _normalized(x: np.ndarray) -> np.ndarray:
    """Return log-probabilities whose sum is 1 in float64: what float32 leaves out would look like a divergence."""
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))
