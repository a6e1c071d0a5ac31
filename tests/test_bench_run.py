"""The runner of `kvmlx bench`, over an engine without a model: who is asked what, how often, and what is kept."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvmlx.bench import runner as module
from kvmlx.bench.config import Config
from kvmlx.bench.records import FULL, Costs, Fidelity, ResultsFile, Score, Skip, Subject, read
from kvmlx.bench.runner import Runner, digits, drift, entries
from kvmlx.bench.types import Cost, Prompt, Question, Sample
from kvmlx.types import KVMLXError, StrategyError

RUN = {"settings": {}, "machine": {}, "started": "", "command": ""}
MODEL = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "vocab_size": 8,
}
CONFIG = Config(
    strategies=("snapkv", "small"), tasks=("easy",), samples=2, lengths=(1024,), fidelity_tokens=4, steps=2, repeats=1
)


class Words:
    """A tokenizer whose tokens are words."""

    def __init__(self) -> None:
        self.words = [f"w{i}" for i in range(1200)]  # the same in every run, whatever comes first

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        for word in text.split():
            if word not in self.words:
                self.words.append(word)
        return [self.words.index(word) for word in text.split()]

    def decode(self, tokens: Sequence[int]) -> str:
        return " ".join(self.words[t] for t in tokens)


class Engine:
    """Answers with the last word of the context; notes all that it is asked to do."""

    name, device, dtype = "fake", "none", "float32"

    def __init__(self) -> None:
        self.tokenizer = Words()
        self.calls: list[tuple[str, ...]] = []
        self.stop_after: int | None = None
        self.drifts = True

    def _note(self, *call: str) -> None:
        self.calls.append(call)
        if self.stop_after is not None and len(self.calls) > self.stop_after:
            raise KeyboardInterrupt

    def count(self, name: str) -> int:
        return sum(call[0] == name for call in self.calls)

    def check(self, method: str) -> None:
        if method.startswith("tova"):
            raise StrategyError("tova cannot be run here")

    def acts_at_end(self, method: str) -> bool:
        return method == FULL or "budget" in method

    def record(self, tokens: Sequence[int], methods: Sequence[str]) -> Any:
        self._note("record", " ".join(methods))
        return ("recorded", tuple(tokens))

    def compress(self, recorded: Any, method: str) -> Any:
        self._note("compress", method)
        assert recorded[0] == "recorded"
        return (method, recorded[1])

    def prefill(self, tokens: Sequence[int], method: str) -> Any:
        self._note("prefill", method)
        return (method, tuple(tokens))

    def answer(self, state: Any, tokens: Sequence[int], max_tokens: int) -> list[int]:
        self._note("answer", state[0], self.tokenizer.decode(state[1]), self.tokenizer.decode(tokens))
        return [state[1][-1]][:max_tokens]

    def answers(self, state: Any, questions: Sequence[Sequence[int]], max_tokens: Sequence[int]) -> Iterator[list[int]]:
        for asked, most in zip(questions, max_tokens, strict=True):
            yield self.answer(state, asked, most)

    def forced(self, state: Any, tokens: Sequence[int]) -> Iterator[np.ndarray]:
        self._note("forced", state[0], str(len(tokens)))
        for i in range(len(tokens)):
            logits = np.arange(2000, dtype=np.float32) * 1e-3
            logits[i] += 1 + (state[0] != FULL and self.drifts)
            yield logits - np.log(np.exp(logits).sum())

    def sizes(self, state: Any) -> tuple[int, int]:
        return 10, 10

    def cost(self, tokens: Sequence[int], method: str, *, batch: int, steps: int, repeats: int) -> Cost:
        self._note("cost", method, str(batch))
        return Cost(1, None, 2, None, (0.5,) * repeats, (0.1,) * steps)

    def allocated_bytes(self) -> None:
        return None


class Task:
    """Contexts that end with the answer, or not."""

    description = ""

    def __init__(self, name: str, answer: str, questions: int = 1, count: int | None = None) -> None:
        self.name, self.word, self.questions, self.count = name, answer, questions, count

    def make(self, index: int, length: int, seed: int, tokenizer: Any) -> Sample:
        if self.name == "long":
            raise KVMLXError("long needs 5000 tokens")
        asked = tuple(Question(f"what {i} ?", (self.word,), "it is", 3) for i in range(self.questions))
        return Sample(self.name, index, length, f"context {index} of {self.name} ends yes", asked)


TASKS = {
    "easy": Task("easy", "yes"),
    "hard": Task("hard", "no"),
    "several": Task("several", "yes", 3),
    "few": Task("few", "yes", count=1),
    "long": Task("long", "yes"),
}


@pytest.fixture(autouse=True)
def tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "prose", lambda: " ".join(f"w{i}" for i in range(1200)))
    monkeypatch.setattr(module, "tasks_of", lambda names, text, questions: [TASKS[n] for n in names])


def run(path: Path, config: Config = CONFIG, engine: Engine | None = None, **options: Any) -> Engine:
    engine = engine or Engine()
    Runner(config, engine, MODEL, ResultsFile(path, RUN), **options).run()
    return engine


def test_everything_is_asked_once_and_written_down(tmp_path: Path) -> None:
    engine = run(tmp_path / "r.jsonl")
    results = read(tmp_path / "r.jsonl")
    methods = {s.subject.family for s in results.of(Score)}
    assert methods == {FULL, "random", "streaming", "int8", "int4", "snapkv", "small"}
    assert len(results.of(Score)) == 7 * 2 and len(results.of(Fidelity)) == 6 and len(results.of(Costs)) == 7
    assert all(s.score == 1.0 and s.response == "yes" for s in results.of(Score))
    matched = [s.subject for s in results.of(Score) if s.subject.family == "snapkv"]
    assert {s.target for s in matched} == {4.0} and all(0.23 < s.ratio <= 0.25 for s in matched)
    assert {s.subject.target for s in results.of(Score) if s.subject.family == "small"} == {None}
    # One prefill a context, whatever acts at its end; a prefill of their own for those that act before.
    assert engine.count("record") == 2 + 1
    own = [call[1] for call in engine.calls if call[0] == "prefill"]
    assert sorted(set(own)) == ["int4", "int8", "small"] and len(own) == 3 * (2 + 1)


def test_a_second_run_does_nothing_again(tmp_path: Path) -> None:
    run(tmp_path / "r.jsonl")
    before = read(tmp_path / "r.jsonl").records
    engine = run(tmp_path / "r.jsonl")
    assert engine.calls == [] and read(tmp_path / "r.jsonl").records == before


def test_more_of_something_runs_only_that(tmp_path: Path) -> None:
    run(tmp_path / "r.jsonl")
    engine = run(tmp_path / "r.jsonl", CONFIG.but({"samples": 3}))
    contexts = {call[2] for call in engine.calls if call[0] == "answer"}
    assert contexts == {"context 2 of easy ends yes"} and engine.count("cost") == 0 == engine.count("forced")


@pytest.mark.parametrize("calls", [0, 1, 7, 20, 40])
def test_an_interruption_loses_nothing(tmp_path: Path, calls: int) -> None:
    whole = run(tmp_path / "whole.jsonl")
    engine = Engine()
    engine.stop_after = calls
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "r.jsonl", engine=engine)
    again = run(tmp_path / "r.jsonl")
    assert read(tmp_path / "r.jsonl").records == read(tmp_path / "whole.jsonl").records
    answered = sum(e.count("answer") for e in (engine, again))
    assert answered <= whole.count("answer") + 1, "at most the answer that was cut off is asked for again"


class Numbering(Engine):
    """Says the question's number too."""

    def answer(self, state: Any, tokens: Sequence[int], max_tokens: int) -> list[int]:
        return [*super().answer(state, tokens, max_tokens), tokens[1]]


@pytest.mark.parametrize("calls", range(2, 12))
def test_an_interruption_between_questions_asks_their_batch_again(tmp_path: Path, calls: int) -> None:
    config = CONFIG.but({"tasks": ["several"], "measures": ["scores"], "samples": 1})
    run(tmp_path / "whole.jsonl", config, Numbering())
    engine = Numbering()
    engine.stop_after = calls
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "r.jsonl", config, engine)
    cut = read(tmp_path / "r.jsonl").of(Score)
    again = run(tmp_path / "r.jsonl", config, Numbering())
    assert read(tmp_path / "r.jsonl").records == read(tmp_path / "whole.jsonl").records
    whole = {s.subject.method for s in cut if sum(t.subject == s.subject for t in cut) == 3}
    asked = Counter(call[1] for call in again.calls if call[0] == "answer")
    assert set(asked.values()) == {3} and not whole & set(asked)


def test_tasks_that_the_full_cache_fails_are_left_to_it(tmp_path: Path) -> None:
    config = CONFIG.but({"tasks": ["hard", "easy"], "measures": ["scores"]})
    run(tmp_path / "r.jsonl", config)
    results = read(tmp_path / "r.jsonl")
    assert {s.subject.method for s in results.of(Score) if s.task == "hard"} == {FULL}
    assert len({s.subject.method for s in results.of(Score) if s.task == "easy"}) == 7
    (skip,) = results.of(Skip)
    assert skip.what == "score agnostic hard" and "0.00" in skip.reason
    run(tmp_path / "r.jsonl", config.but({"everything": True}))
    assert len({s.subject.method for s in read(tmp_path / "r.jsonl").of(Score) if s.task == "hard"}) == 7


def test_several_questions_share_one_compressed_context(tmp_path: Path) -> None:
    config = CONFIG.but({"tasks": ["several"], "measures": ["scores"], "samples": 1})
    engine = run(tmp_path / "r.jsonl", config)
    snap = [call for call in engine.calls if call[1].startswith("snapkv(")]
    assert [c[0] for c in snap] == ["compress", "answer", "answer", "answer"]
    assert {c[2] for c in snap if c[0] == "answer"} == {"context 0 of several ends yes"}
    assert len({c[3] for c in snap if c[0] == "answer"}) == 3


def test_aware_methods_see_the_question_and_agnostic_ones_do_not(tmp_path: Path) -> None:
    config = CONFIG.but({"modes": ["agnostic", "aware"], "measures": ["scores"], "samples": 1})
    engine = run(tmp_path / "r.jsonl", config)
    seen = [call[2:] for call in engine.calls if call[0] == "answer" and call[1] == FULL]
    assert seen == [
        ("context 0 of easy ends yes", "what 0 ? it is"),
        ("context 0 of easy ends yes what 0 ? it", "is"),
    ]


def test_a_task_may_have_fewer_samples(tmp_path: Path) -> None:
    run(tmp_path / "r.jsonl", CONFIG.but({"tasks": ["few"], "samples": 5, "measures": ["scores"]}))
    assert {s.sample for s in read(tmp_path / "r.jsonl").of(Score)} == {0}


def test_a_task_that_needs_more_tokens_is_written_down(tmp_path: Path) -> None:
    run(tmp_path / "r.jsonl", CONFIG.but({"tasks": ["long", "easy"], "measures": ["scores"]}))
    results = read(tmp_path / "r.jsonl")
    assert [(s.what, s.reason) for s in results.of(Skip)] == [("score agnostic long", "long needs 5000 tokens")]
    assert {s.task for s in results.of(Score)} == {"easy"}


def test_what_cannot_take_part_is_written_down_with_its_reason(tmp_path: Path) -> None:
    config = CONFIG.but({"strategies": ["tova", "snapkv | int8"], "match_bytes": [4, 64]})
    run(tmp_path / "r.jsonl", config)
    skips = {(s.subject.family, s.subject.target): s.reason for s in read(tmp_path / "r.jsonl").of(Skip)}
    assert skips[("tova", 4.0)] == "tova cannot be run here"
    assert "holds" in skips[("snapkv | int8", 64.0)]


def test_a_lossy_method_that_changes_nothing_is_an_error(tmp_path: Path) -> None:
    engine = Engine()
    engine.drifts = False
    with pytest.raises(KVMLXError, match="changed nothing at all"):
        run(tmp_path / "r.jsonl", CONFIG.but({"measures": ["fidelity"]}), engine)


def test_prose_that_is_too_short_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KVMLXError, match="prose"):
        run(tmp_path / "r.jsonl", CONFIG.but({"lengths": [2000], "measures": ["fidelity"]}))


def test_progress_ends_at_its_total(tmp_path: Path) -> None:
    config = CONFIG.but({"tasks": ["hard", "easy", "few", "long"], "strategies": ["tova", "snapkv"]})
    steps: list[tuple[str, int, int]] = []
    run(tmp_path / "r.jsonl", config, on_step=lambda *step: steps.append(step))
    done = [n for _, n, _ in steps]
    assert done == sorted(done) and steps[-1][1] == steps[-1][2] == steps[0][2]
    assert steps[-2][1] == steps[-1][2] - 1, "the last piece of work is the last one counted"


class Presses:
    """kvpress without a process: answers like the engine, and refuses one press on one question."""

    def __init__(self) -> None:
        self.tokenizer = Words()

    def subject(self, family: str, target: float | None, length: int) -> Subject:
        if target == 64:
            raise KVMLXError("kvpress masks rows")
        return Subject(f"{family}(budget=0.25)", family, target, 0.25)

    def answers(self, method: str, prompts: Sequence[Prompt], most: Sequence[int]) -> Iterator[list[int]]:
        for prompt in prompts:
            if "tova" in method:
                raise KVMLXError("tova asserts something")
            yield [prompt.context[-1]]

    def fidelity(self, method: str, prefix: Any, fed: Any, scored: Any) -> Any:
        if "tova" in method:
            raise KVMLXError("tova asserts something")
        return ((0.5,) * len(scored), (False,) * len(scored), (1.0,) * len(scored), (1.0,) * len(scored))

    def cost(self, tokens: Sequence[int], method: str, *, batch: int, steps: int, repeats: int) -> Cost:
        return Cost(1, 1, 4, None, (0.5,) * repeats, (0.1,) * steps)


def test_presses_take_part_and_what_they_refuse_is_written_down(tmp_path: Path) -> None:
    presses = ("kvpress: snapkv", "kvpress: tova")
    config = CONFIG.but({"kvpress": "python", "presses": presses, "match_bytes": [4, 64], "strategies": ["small"]})
    run(tmp_path / "r.jsonl", config, presses=Presses())
    results = read(tmp_path / "r.jsonl")
    own = {r.subject.family for r in results.of(Score)}
    assert "kvpress: snapkv" in own and "kvpress: tova" not in own
    assert all(s.score == 1.0 for s in results.of(Score) if s.subject.family == "kvpress: snapkv")
    assert [f.kl for f in results.of(Fidelity) if f.subject.family == "kvpress: snapkv"] == [(0.5,) * 4]
    reasons = {(s.subject.family, s.what): s.reason for s in results.of(Skip)}
    assert reasons["kvpress: snapkv", "all"] == "kvpress masks rows"
    assert reasons["kvpress: tova", "score agnostic easy"] == reasons["kvpress: tova", "fidelity"]
    assert "--backend torch" in reasons["kvpress: snapkv", "cost"], "the engine is not PyTorch's"
    before = results.records
    run(tmp_path / "r.jsonl", config, presses=Presses())
    assert read(tmp_path / "r.jsonl").records == before


def test_costs_of_presses_beside_an_engine_of_the_same_framework(tmp_path: Path) -> None:
    engine = Engine()
    engine.name = "torch"
    config = CONFIG.but({"kvpress": "python", "presses": ["kvpress: snapkv"], "measures": ["costs"]})
    run(tmp_path / "r.jsonl", config, engine, presses=Presses())
    assert [c.full_nbytes for c in read(tmp_path / "r.jsonl").of(Costs) if "kvpress" in c.subject.family] == [4]


def test_presses_without_kvpress_are_written_down(tmp_path: Path) -> None:
    config = CONFIG.but({"kvpress": "python", "presses": ["kvpress: snapkv"], "measures": ["scores"]})
    run(tmp_path / "r.jsonl", config)
    assert any("--kvpress PYTHON" in s.reason for s in read(tmp_path / "r.jsonl").of(Skip))


def test_families_are_run_at_every_target_and_budget_others_once() -> None:
    config = Config(strategies=("snapkv | int4", "snapkv(budget=0.3)", "small"), match_bytes=(2.0, 4.0), budgets=(0.5,))
    found = [(e.family, e.target) for e in entries(config)]
    assert [t for f, t in found if f == "snapkv | int4"] == [2.0, 4.0]
    assert ("small", None) in found and ("snapkv(budget=0.3)", None) in found
    assert sum(t is None and "budget=0.5" in f for f, t in found) == 3, "random, streaming and snapkv | int4"
    assert len(found) == len(set(found))


def test_numbers_are_written_with_six_digits() -> None:
    written = digits([1 / 3, True, 1e-9 / 3])
    assert written == (0.333333, True, 3.33333e-10) and written[1] is True


def test_drift_is_that_of_the_definitions() -> None:
    full = np.log(np.array([[0.5, 0.25, 0.25], [0.2, 0.7, 0.1]], np.float32))
    other = np.log(np.array([[0.25, 0.5, 0.25], [0.2, 0.7, 0.1]], np.float32))
    kl, flips, nll, full_nll = drift(full, other, [1, 2])
    assert kl == pytest.approx([0.25 * np.log(2), 0.0], abs=1e-6) and flips == (True, False)
    assert nll == pytest.approx([-np.log(0.5), -np.log(0.1)]) and full_nll == pytest.approx(
        [-np.log(0.25), -np.log(0.1)]
    )
    json.dumps([kl, flips, nll, full_nll])
