"""The benchmark's scores, computed by hand; the tasks from the user's own files, and from the Hub."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvmlx.bench.tasks import file_task, hub_task, prompt_of, score, tasks_of
from kvmlx.bench.tasks.scores import METRICS, Choice
from kvmlx.bench.types import Question
from kvmlx.types import KVMLXError
from tests.pieces import Pieces


@pytest.fixture
def tokenizer() -> Pieces:
    return Pieces()


# Scores


@pytest.mark.parametrize(
    ("metric", "answers", "response", "expected"),
    [
        ("all", ("12", "345"), "They are 12 and 346.", 0.5),
        ("all", ("Red", "blue"), "RED, Blue", 1.0),
        ("all", ("12",), "", 0.0),
        ("any", ("Paris", "France"), "in france", 1.0),
        ("any", ("Paris", "France"), "in Spain", 0.0),
        # "quick brown fox" against "brown dog": one word in common, 2 * 1 / (3 + 2)
        ("f1", ("a brown dog",), "The quick, brown fox!", 0.4),
        ("f1", ("no", "brown fox"), "the brown fox", 1.0),
        ("f1", ("yes",), "no", 0.0),
        ("f1", ("yes yes",), "yes", 2 / 3),
        ("f1_line", ("brown",), "\nbrown\nand much else", 1.0),
        # longest common subsequence "the cat on": 2 * 3 / (5 + 4)
        ("rouge_l", ("the cat on mats",), "the fat cat sat on", 6 / 9),
        ("rouge_l", ("b a",), "a b", 0.5),
        ("rouge_l", ("x",), "", 0.0),
        ("rouge_l_line", ("a b",), "a b\nc d", 1.0),
        # 2 * 3 characters / 8, comments left out
        ("code", ("abcd",), "# abcd\n\nabcx", 0.0),
        ("code", ("abcd",), "\n# abcd\nabcx", 0.75),
        ("count", ("Paragraph 7",), "Paragraph 7 or 8, not 17", 1 / 3),
        ("count", ("5",), "five", 0.0),
    ],
)
def test_scores_by_hand(metric: str, answers: tuple[str, ...], response: str, expected: float) -> None:
    assert score(response, Question("?", answers, metric=metric)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("response", "expected"),
    [("Food", 1.0), ("Food or City\nSport", 0.5), ("City", 0.0), ("Fast food", 0.0), ("\nFood", 1.0), ("", 0.0)],
)
def test_choices_by_hand(response: str, expected: float) -> None:
    question = Choice("?", ("Food",), choices=("Food", "City", "Sport"))
    assert score(response, question) == expected


def test_a_choice_within_the_answer_does_not_count_as_named() -> None:
    question = Choice("?", ("Fast food",), choices=("food", "Fast food"))
    assert score("Fast food", question) == 1.0


def test_an_unknown_metric_is_named() -> None:
    with pytest.raises(KVMLXError, match=r"no metric 'rouge': there are all, any, f1"):
        score("x", Question("?", ("x",), metric="rouge"))


# The user's own files


def write(path: Path, *lines: dict[str, Any] | str) -> Path:
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines), encoding="utf-8")
    return path


def test_a_file_of_questions_about_a_text(tmp_path: Path, tokenizer: Pieces) -> None:
    text = tmp_path / "book.txt"
    text.write_text("\ufeffThe cat is grey. The dog is brown.\n", encoding="utf-8")
    questions = write(
        tmp_path / "book.jsonl",
        {"question": "What is the cat?", "answers": ["grey"], "prefix": "The cat is", "max_tokens": 5, "metric": "f1"},
        "",
        {"question": "And the dog?", "answers": ["brown", "big"]},
    )
    (task,) = tasks_of([], text=str(text), questions=str(questions))
    assert task.name == "file:book" and task.count == 1
    sample = task.make(0, 1024, 0, tokenizer)
    assert sample.context == "The cat is grey. The dog is brown."
    assert sample.questions == (
        Question("What is the cat?", ("grey",), "The cat is", 5, "f1"),
        Question("And the dog?", ("brown", "big")),
    )
    assert tokenizer.decode(prompt_of(sample, sample.questions[1], tokenizer).context).endswith(sample.context)
    tokens = max(len(p.context) + len(p.question) for p in (prompt_of(sample, q, tokenizer) for q in sample.questions))
    assert task.make(0, tokens, 0, tokenizer).context == sample.context
    with pytest.raises(KVMLXError, match=rf"sample 0 has {tokens} tokens .* at least that, not {tokens - 1}"):
        task.make(0, tokens - 1, 0, tokenizer)
    with pytest.raises(KVMLXError, match="has 1 samples, there is none with the index 1"):
        task.make(1, 1024, 0, tokenizer)


def test_a_file_whose_lines_bring_contexts(tmp_path: Path, tokenizer: Pieces) -> None:
    lines = [{"question": f"{i}?", "answers": [str(i)], "context": f"It is {i}."} for i in range(3)]
    task = file_task(write(tmp_path / "mine.jsonl", *lines))
    assert task.count == 3 and task.make(2, 100, 0, tokenizer).context == "It is 2."


GOOD = {"question": "Why?", "answers": ["so"], "context": "So."}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "must be a JSON object"),
        ({**GOOD, "answer": "so"}, r"no field 'answer': there are question, answers, .*Did you mean 'answers'"),
        ({k: GOOD[k] for k in ("answers", "context")}, "question is missing"),
        ({**GOOD, "question": " "}, "question must be a text, got ' '"),
        ({**GOOD, "question": 3}, "question must be a text, got 3"),
        ({k: GOOD[k] for k in ("question", "context")}, "answers must be a list"),
        ({**GOOD, "answers": "so"}, "answers must be a list such as .* got 'so'"),
        ({**GOOD, "answers": []}, "answers must be a list"),
        ({**GOOD, "answers": ["so", ""]}, "answers must be texts, got '' among them"),
        ({**GOOD, "prefix": None}, "prefix must be a text, got None"),
        ({**GOOD, "max_tokens": 0}, "max_tokens must be a whole number of at least 1, got 0"),
        ({**GOOD, "max_tokens": True}, "max_tokens must be a whole number"),
        ({**GOOD, "metric": "exact"}, "no metric 'exact'"),
        ({k: GOOD[k] for k in ("question", "answers")}, "context is missing: without a text file"),
    ],
)
def test_a_wrong_line_is_named(line: Any, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "mine.jsonl", GOOD, line)
    with pytest.raises(KVMLXError, match=rf"mine\.jsonl, line 2: {message}"):
        file_task(path)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(KVMLXError, match=r"none\.jsonl cannot be read: No such file"):
        file_task(tmp_path / "none.jsonl")
    with pytest.raises(KVMLXError, match=r"empty\.jsonl has no questions"):
        file_task(write(tmp_path / "empty.jsonl", "", ""))
    (tmp_path / "latin.jsonl").write_bytes(b'{"question": "\xe9"}')
    with pytest.raises(KVMLXError, match=r"latin\.jsonl is not UTF-8 text: .* at byte 14"):
        file_task(tmp_path / "latin.jsonl")
    good = write(tmp_path / "good.jsonl", {k: GOOD[k] for k in ("question", "answers")})
    with pytest.raises(KVMLXError, match=r"none\.txt cannot be read"):
        file_task(good, tmp_path / "none.txt")
    with pytest.raises(KVMLXError, match=r"empty\.txt is empty"):
        file_task(good, write(tmp_path / "empty.txt", " "))
    with pytest.raises(KVMLXError, match="line 1: context must not be there: with a text file"):
        file_task(write(tmp_path / "two.jsonl", GOOD), write(tmp_path / "book.txt", "So."))


def test_unknown_tasks_are_named() -> None:
    with pytest.raises(KVMLXError, match=r"no task 'niah_singel_1': .*Did you mean 'niah_single_1'"):
        tasks_of(["vt", "niah_singel_1"])
    assert [task.name for task in tasks_of(["vt", "cwe"])] == ["vt", "cwe"]


# The Hub: rows of the same columns as its data sets have; nothing is fetched


def serve(monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]] | Exception) -> list[tuple[Any, ...]]:
    """Put a `datasets` in place that has these rows, and return what is asked of it."""
    asked = []

    def load_dataset(*args: Any, **kwargs: Any) -> list[dict[str, Any]]:
        asked.append((*args, kwargs))
        if isinstance(rows, Exception):
            raise rows
        return rows

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return asked


def ruler_row(task: str, number: str) -> dict[str, Any]:
    return {
        "context": f"A number is hidden.\nIt is {number}.\n",
        "question": "What is it?",
        "answer_prefix": "It is ",
        "answer": [number],
        "task": task,
        "max_new_tokens": 128,
    }


def longbench_row(**changed: Any) -> dict[str, Any]:
    row = {
        "context": "Read this.\n\n" + "word " * 400,
        "question": "Question: Who?\n",
        "answer_prefix": "Answer:",
        "answers": ["Ann", "Anna"],
        "all_classes": None,
        "max_new_tokens": 52,
        "task": "hotpotqa",
    }
    return {**row, **changed}


def test_ruler_from_the_hub(monkeypatch: pytest.MonkeyPatch, tokenizer: Pieces) -> None:
    asked = serve(monkeypatch, [ruler_row("niah_single_1", "17"), ruler_row("qa_1", "18"), ruler_row("qa_1", "19")])
    (task,) = tasks_of(["ruler:qa_1:4096"])
    assert asked == [("simonjegou/ruler", "4096", {"split": "test"})]
    assert task.name == "ruler:qa_1:4096" and task.count == 2
    sample = task.make(1, 4096, 0, tokenizer)
    assert sample.context == "A number is hidden.\nIt is 19."
    assert sample.questions == (Question("What is it?", ("19",), "It is", 128, "any"),)
    assert hub_task("ruler:niah_single_1:8192").make(0, 99, 0, tokenizer).questions[0].metric == "all"
    with pytest.raises(KVMLXError, match="sample 0 has"):
        task.make(0, 5, 0, tokenizer)


def test_longbench_from_the_hub(monkeypatch: pytest.MonkeyPatch, tokenizer: Pieces) -> None:
    asked = serve(monkeypatch, [longbench_row()])
    task = hub_task("longbench:hotpotqa")
    assert asked == [("Xnhyacinth/LongBench", "hotpotqa", {"split": "test"})]
    whole = task.make(0, 1000, 0, tokenizer)
    assert whole.context == ("Read this.\n\n" + "word " * 400).strip()
    assert whole.questions == (Question("Question: Who?", ("Ann", "Anna"), "Answer:", 52, "f1"),)
    # A context that is too long loses its middle.
    cut = task.make(0, 200, 0, tokenizer)
    prompt = prompt_of(cut, cut.questions[0], tokenizer)
    assert 195 <= len(prompt.context) + len(prompt.question) <= 200
    assert cut.context.startswith("Read this.") and cut.context.endswith("word word")
    with pytest.raises(KVMLXError, match="a question alone has"):
        task.make(0, 5, 0, tokenizer)


def test_longbench_by_its_metrics(monkeypatch: pytest.MonkeyPatch, tokenizer: Pieces) -> None:
    serve(monkeypatch, [longbench_row(answers=["Food"], all_classes=["Food", "City"])])
    (question,) = hub_task("longbench:trec").make(0, 1000, 0, tokenizer).questions
    assert score("Food\nCity", question) == 1.0 and score("Food City", question) == 0.5
    serve(monkeypatch, [longbench_row(answers=["return x"])])
    (question,) = hub_task("longbench:lcc").make(0, 1000, 0, tokenizer).questions
    assert score("    return x", question) == pytest.approx(2 * 8 / 20)
    assert {"f1", "rouge_l", "code", "count"} <= set(METRICS)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ruler:niah_single:4096", "no RULER task 'niah_single': .*Did you mean 'niah_single_"),
        ("ruler:vt:5000", "no length of RULER '5000': there are 4096, 8192, 16384"),
        ("longbench:dureader", "no English data set of LongBench 'dureader'"),
        ("ruler:vt", "is no data set on the Hub: write ruler:niah_single_1:4096 or longbench:hotpotqa"),
        ("squad:train", "is no data set on the Hub"),
    ],
)
def test_unknown_data_sets_are_named(name: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = serve(monkeypatch, [])
    with pytest.raises(KVMLXError, match=message):
        tasks_of([name])
    assert not asked


def test_the_hub_is_refused_without_its_package_or_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(KVMLXError, match=r"longbench:lcc needs the package datasets, .*pip install"):
        hub_task("longbench:lcc")
    serve(monkeypatch, ConnectionError("Couldn't reach it\n(offline mode is enabled)"))
    with pytest.raises(
        KVMLXError, match=r"cannot fetch simonjegou/ruler .*ConnectionError: Couldn't reach it\); with a"
    ):
        hub_task("ruler:vt:4096")
    serve(monkeypatch, KeyError("a bug"))
    with pytest.raises(KeyError):
        hub_task("ruler:vt:4096")
    serve(monkeypatch, [{"context": "x"}])
    with pytest.raises(KVMLXError, match="has changed, it lacks the columns answer, answer_prefix"):
        hub_task("ruler:vt:4096")
