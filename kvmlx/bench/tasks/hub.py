"""RULER and LongBench from the Hugging Face Hub, through the optional package `datasets`.

The data sets are those that kvpress evaluates on: contexts, questions and the beginnings of answers as their authors
wrote them, already divided. Only their mapping to samples is here.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from kvmlx.bench.tasks.rows import Given, Row
from kvmlx.bench.tasks.scores import Choice
from kvmlx.bench.types import Question
from kvmlx.types import KVMLXError, suggest

RULER = "simonjegou/ruler"
RULER_LENGTHS = ("4096", "8192", "16384")
NIAH = ("single_1", "single_2", "single_3", "multikey_1", "multikey_2", "multikey_3", "multivalue", "multiquery")
RULER_TASKS = (*(f"niah_{name}" for name in NIAH), "vt", "cwe", "fwe", "qa_1", "qa_2")

LONGBENCH = "Xnhyacinth/LongBench"
LONGBENCH_METRICS = {
    "narrativeqa": "f1",
    "qasper": "f1",
    "multifieldqa_en": "f1",
    "hotpotqa": "f1",
    "2wikimqa": "f1",
    "musique": "f1",
    "gov_report": "rouge_l",
    "qmsum": "rouge_l",
    "multi_news": "rouge_l",
    "trec": "choice",
    "triviaqa": "f1_line",
    "samsum": "rouge_l_line",
    "passage_retrieval_en": "count",
    "passage_count": "count",
    "lcc": "code",
    "repobench-p": "code",
}
"""The English and code data sets; the Chinese ones are scored by words that a segmenter has to find."""

FORMS = "ruler:niah_single_1:4096 or longbench:hotpotqa"
NETWORK_PACKAGES = frozenset({"datasets", "huggingface_hub", "requests", "httpx", "httpcore", "urllib3", "fsspec"})


def hub_task(name: str) -> Given:
    """Return a task of a data set on the Hub.

    Args:
        name: ``"ruler:TASK:LENGTH"`` or ``"longbench:NAME"``.

    Raises:
        KVMLXError: there is no such data set, the package `datasets` is missing, or nothing can be fetched.
    """
    match name.split(":"):
        case ["ruler", task, length]:
            _check("RULER task", task, RULER_TASKS)
            _check("length of RULER", length, RULER_LENGTHS)
            rows = [
                _ruler(row) for row in _load(name, RULER, length, ("task", *_COLUMNS, "answer")) if row["task"] == task
            ]
            return Given(name, f"RULER's {task} of {length} tokens, from {RULER}", tuple(rows))
        case ["longbench", task]:
            _check("English data set of LongBench", task, tuple(LONGBENCH_METRICS))
            rows = [
                _longbench(row, task) for row in _load(name, LONGBENCH, task, (*_COLUMNS, "answers", "all_classes"))
            ]
            return Given(name, f"LongBench's {task}, from {LONGBENCH}", tuple(rows), cut=True)
    raise KVMLXError(f"{name!r} is no data set on the Hub: write {FORMS}")


_COLUMNS = ("context", "question", "answer_prefix", "max_new_tokens")


def _ruler(row: Mapping[str, Any]) -> Row:
    metric = "any" if row["task"].startswith("qa_") else "all"
    return Row(row["context"].rstrip(), (_question(Question, row, row["answer"], metric=metric),))


def _longbench(row: Mapping[str, Any], task: str) -> Row:
    metric = LONGBENCH_METRICS[task]
    if metric == "choice":
        question = _question(Choice, row, row["answers"], choices=tuple(row["all_classes"]))
    else:
        question = _question(Question, row, row["answers"], metric=metric)
    return Row(row["context"].rstrip(), (question,))


def _question(make: Callable[..., Question], row: Mapping[str, Any], answers: Iterable[str], **more: Any) -> Question:
    return make(
        text=row["question"].strip(),
        answers=tuple(answers),
        prefix=row["answer_prefix"].strip(),
        max_tokens=int(row["max_new_tokens"]),
        **more,
    )


def _load(name: str, repository: str, config: str, columns: Iterable[str]) -> list[Mapping[str, Any]]:
    """Return the rows of a data set's test split; `datasets` keeps what it has fetched."""
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise KVMLXError(
            f"{name} needs the package datasets, which is not installed: pip install datasets, or take a generated "
            "task of the same kind, which needs no network"
        ) from error
    try:
        rows = list(datasets.load_dataset(repository, config, split="test"))
    except Exception as error:
        # No network, offline by HF_HUB_OFFLINE, gone, or renamed: each library in between has errors of its own.
        if (
            not isinstance(error, OSError | ValueError)
            and type(error).__module__.partition(".")[0] not in NETWORK_PACKAGES
        ):
            raise
        why = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
        raise KVMLXError(
            f"{name}: cannot fetch {repository} from the Hugging Face Hub ({type(error).__name__}: {why}); with a "
            "network unset HF_HUB_OFFLINE and try again, or take a generated task, which needs none"
        ) from error
    missing = sorted(set(columns) - set(rows[0])) if rows else ["all"]
    if missing:
        raise KVMLXError(f"{name}: {repository} has changed, it lacks the columns {', '.join(missing)}")
    return rows


def _check(what: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise KVMLXError(f"no {what} {value!r}: there are {', '.join(known)}.{suggest(value, known)}")
