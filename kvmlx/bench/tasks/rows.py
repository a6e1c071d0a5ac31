"""Tasks whose contexts are given, not made up: the user's own files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvmlx.bench.tasks.base import largest
from kvmlx.bench.tasks.prompts import prompt_tokens
from kvmlx.bench.tasks.scores import check_metric
from kvmlx.bench.types import Question, Sample
from kvmlx.types import KVMLXError, suggest

FIELDS = ("question", "answers", "prefix", "max_tokens", "metric", "context")


@dataclass(frozen=True, slots=True)
class Row:
    """A context and what is asked about it."""

    context: str
    questions: tuple[Question, ...]


@dataclass(frozen=True, slots=True)
class Given:
    """A task of given contexts, each as long as it is: a sample can be shorter than the length asked for."""

    name: str
    description: str
    rows: tuple[Row, ...]
    cut: bool = False
    """Whether a context that is too long loses its middle, as LongBench's do; it is refused otherwise."""

    @property
    def count(self) -> int:
        return len(self.rows)

    def make(self, index: int, length: int, seed: int, tokenizer: Any) -> Sample:
        if not 0 <= index < self.count:
            raise KVMLXError(f"{self.name} has {self.count} samples, there is none with the index {index}")
        row = self.rows[index]
        tokens = prompt_tokens(row.context, row.questions, tokenizer)
        context = row.context
        if tokens > length:
            if not self.cut:
                raise KVMLXError(
                    f"{self.name}: sample {index} has {tokens} tokens with its longest question: "
                    f"give a length of at least that, not {length}"
                )
            context = self._without_middle(row, length, tokenizer)
        return Sample(self.name, index, length, context, row.questions)

    def _without_middle(self, row: Row, length: int, tokenizer: Any) -> str:
        def halves(characters: int) -> str:
            return row.context[: characters // 2] + row.context[len(row.context) - characters // 2 :]

        def tokens(characters: int) -> int:
            return prompt_tokens(halves(characters), row.questions, tokenizer)

        least = tokens(0)
        if least > length:
            raise KVMLXError(f"{self.name}: a question alone has {least} tokens: give a greater length than {length}")
        return halves(largest(tokens, 0, least, length))


def file_task(questions: str | Path, text: str | Path | None = None) -> Given:
    """Return the user's own task.

    Args:
        questions: JSONL; a line has ``question`` and ``answers``, and may have ``prefix`` (how the answer begins),
            ``max_tokens``, ``metric`` (of `scores.METRICS`) and, where ``text`` is None, ``context``.
        text: a file that all questions are about, one sample; None: each line is a sample of its own.

    Raises:
        KVMLXError: a file cannot be read or is wrong; the message names file, line and field.
    """
    path = Path(questions)
    lines = [(i, line) for i, line in enumerate(_read(path).splitlines(), 1) if line.strip()]
    if not lines:
        raise KVMLXError(f'{path} has no questions: a line is {{"question": "...", "answers": ["..."]}}')
    read = [_line(f"{path}, line {i}", line, with_context=text is None) for i, line in lines]
    if text is None:
        rows = tuple(Row(context, (question,)) for context, question in read)
        return Given(f"file:{path.stem}", f"{len(rows)} contexts of {path.name}", rows)
    context = _read(Path(text))
    if not context.strip():
        raise KVMLXError(f"{text} is empty: it should be the text that {path.name} asks about")
    description = f"{len(read)} questions of {path.name} about {Path(text).name}"
    return Given(f"file:{path.stem}", description, (Row(context.strip(), tuple(q for _, q in read)),))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise KVMLXError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    except OSError as error:
        raise KVMLXError(f"{path} cannot be read: {error.strerror or error}") from error


def _line(where: str, line: str, *, with_context: bool) -> tuple[str, Question]:
    """Return a line's context, empty where it has none, and its question."""
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise KVMLXError(f"{where}: not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise KVMLXError(f"{where}: must be a JSON object with question and answers, got {line.strip()[:40]!r}")
    for name in fields:
        if name not in FIELDS:
            raise KVMLXError(f"{where}: no field {name!r}: there are {', '.join(FIELDS)}.{suggest(name, FIELDS)}")
    if with_context != ("context" in fields):
        rule = "is missing: without a text file" if with_context else "must not be there: with a text file"
        what = "each line brings its own" if with_context else "all lines are about that"
        raise KVMLXError(f"{where}: context {rule} {what}")
    try:
        check_metric(metric := _text(fields, "metric", "all"))
        question = Question(
            text=_text(fields, "question"),
            answers=_answers(fields),
            prefix=_text(fields, "prefix", ""),
            max_tokens=_max_tokens(fields),
            metric=metric,  # type: ignore[arg-type]
        )
        return _text(fields, "context") if with_context else "", question
    except KVMLXError as error:
        raise KVMLXError(f"{where}: {error}") from error


def _text(fields: dict[str, Any], name: str, default: str | None = None) -> str:
    value = fields.get(name, default)
    if not isinstance(value, str) or (default is None and not value.strip()):
        raise KVMLXError(f"{name} must be a text, got {value!r}" if name in fields else f"{name} is missing")
    return value


def _answers(fields: dict[str, Any]) -> tuple[str, ...]:
    value = fields.get("answers")
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise KVMLXError(f'answers must be a list such as ["42"], got {value!r}')
    for answer in value:
        if not isinstance(answer, str) or not answer.strip():
            raise KVMLXError(f"answers must be texts, got {answer!r} among them")
    return tuple(value)


def _max_tokens(fields: dict[str, Any]) -> int:
    value = fields.get("max_tokens", Question.__dataclass_fields__["max_tokens"].default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise KVMLXError(f"max_tokens must be a whole number of at least 1, got {value!r}")
    return value
