"""The tasks of the benchmark: generated ones by name, the user's own, and those of data sets on the Hub."""

from __future__ import annotations

from collections.abc import Sequence

from kvmlx.bench.tasks import facts, frequency, pairs, tracking
from kvmlx.bench.tasks.base import Generated, Task
from kvmlx.bench.tasks.hub import FORMS, hub_task
from kvmlx.bench.tasks.niah import Needles
from kvmlx.bench.tasks.prompts import prompt_of
from kvmlx.bench.tasks.rows import file_task
from kvmlx.bench.tasks.scores import score
from kvmlx.types import KVMLXError, suggest

__all__ = ["TASKS", "Task", "file_task", "hub_task", "prompt_of", "score", "tasks_of"]

_GENERATED = (
    Generated("niah_single_1", "one number in noise", Needles("noise")),
    Generated("niah_single_2", "one number in prose", Needles()),
    Generated("niah_single_3", "one UUID in prose", Needles(value="uuid")),
    Generated("niah_multikey_1", "one of 4 numbers in prose", Needles(keys=4)),
    Generated("niah_multikey_2", "one number among as many others as fit", Needles("needles")),
    Generated("niah_multikey_3", "one UUID of a UUID among as many others as fit", Needles("needles", "uuid", "uuid")),
    Generated("niah_multivalue", "all 4 numbers of one key in prose", Needles(values=4)),
    Generated("niah_multiquery", "the numbers of 4 keys in prose", Needles(keys=4, queries=4)),
    Generated("vt", "5 variables that a chain of assignments in noise gives one value", tracking.plan),
    Generated("cwe", "the 10 most common words of a numbered list", frequency.common_words),
    Generated("fwe", "the 3 most frequent words of a coded text", frequency.frequent_words),
    Generated("kv_json", "the value of a UUID key in a JSON object of such pairs", pairs.plan),
    Generated("several_questions", "8 questions, each for one fact in the same prose", facts.several_questions),
    Generated("early_fact", "what the user told in the first turn of a long chat", facts.early_fact),
)
TASKS: dict[str, Task] = {task.name: task for task in _GENERATED}
"""The generated tasks; RULER's (2404.06654) under its names."""


def tasks_of(names: Sequence[str], *, text: str | None = None, questions: str | None = None) -> list[Task]:
    """Return the tasks of these names, and the user's own.

    Args:
        names: of `TASKS`, or of data sets on the Hub as `hub_task` takes them.
        text: a file that ``questions`` are about; None: each has a context of its own.
        questions: a JSONL file as `file_task` takes it, or None.

    Raises:
        KVMLXError: a name is unknown, a data set cannot be had, or a file is wrong; the message says what.
    """
    out = [hub_task(name) if ":" in name else _generated(name) for name in names]
    return [*out, file_task(questions, text)] if questions is not None else out


def _generated(name: str) -> Task:
    if name not in TASKS:
        raise KVMLXError(f"no task {name!r}: there are {', '.join(TASKS)}, and {FORMS}.{suggest(name, TASKS)}")
    return TASKS[name]
