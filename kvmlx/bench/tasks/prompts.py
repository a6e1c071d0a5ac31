"""From a sample to tokens, divided where the context ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvmlx.bench.types import Prompt, Question, Sample

Context = str | tuple[str, ...]
"""A text, or the turns of a chat: the user's, the assistant's, and so on, the assistant's last."""

CUT = "\u241ekvmlx\u241e"
"""Stands where the context ends while a chat template is filled in."""
TEMPLATE_OPTIONS = {"enable_thinking": False, "date_string": "1 January 2025"}
"""Of the templates that know them: answers begin at once, and a prompt is the same on every day."""


@dataclass(frozen=True, slots=True)
class Chat(Sample):
    """A sample whose context is a chat of many turns; `Sample.context` is the same as one text."""

    turns: tuple[str, ...] = ()


def has_chat_template(tokenizer: Any) -> bool:
    """Whether a tokenizer, mlx-lm's or transformers', knows how a chat is written."""
    own = getattr(tokenizer, "has_chat_template", None)
    return bool(getattr(tokenizer, "chat_template", None) if own is None else own)


def prompt_of(sample: Sample, question: Question, tokenizer: Any) -> Prompt:
    """Return the tokens of a sample with one of its questions.

    The context's are the same for all questions. The two parts are encoded apart, as a cache of the context
    needs it; where the model has no chat template they are plain text.
    """
    context = sample.turns if isinstance(sample, Chat) else sample.context
    return _encoded(*_parts(context, question, tokenizer), tokenizer)


def prompt_tokens(context: Context, questions: Sequence[Question], tokenizer: Any) -> int:
    """Return the tokens of a prompt with the longest of these questions."""
    parts = [_parts(context, question, tokenizer) for question in questions]
    longest = max(len(_encoded("", after, tokenizer).question) for _, after in parts)
    return len(_encoded(parts[0][0], "", tokenizer).context) + longest


def _parts(context: Context, question: Question, tokenizer: Any) -> tuple[str, str]:
    """Return a prompt's text up to the context's end, and after it."""
    turns = (context,) if isinstance(context, str) else context
    last = "" if len(turns) % 2 == 0 else turns[-1]
    turns = (*turns[: len(turns) - len(turns) % 2], f"{last}{CUT}{_asked(last, question)}")
    if has_chat_template(tokenizer):
        messages = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **TEMPLATE_OPTIONS)
        text += question.prefix
    else:
        names = ("User: ", "Assistant: ") if len(turns) > 1 else ("", "")
        text = "\n\n".join(f"{names[i % 2]}{turn}" for i, turn in enumerate(turns))
        text += "\n\n" + names[1] + question.prefix
        text = text.rstrip(" ") if not question.prefix else text
    before, _, after = text.partition(CUT)
    return before, after


def _asked(context: str, question: Question) -> str:
    return f"\n\n{question.text}" if context else question.text


def _encoded(before: str, after: str, tokenizer: Any) -> Prompt:
    context = _plain(before, tokenizer)
    if not has_chat_template(tokenizer):
        context = _beginning(tokenizer) + context
    return Prompt(tuple(context), tuple(_plain(after, tokenizer)))


def _plain(text: str, tokenizer: Any) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False)) if text else []


def _beginning(tokenizer: Any) -> list[int]:
    """Return the tokens that this tokenizer puts before any text; a chat template writes them itself."""
    text = "a"
    plain, whole = _plain(text, tokenizer), list(tokenizer.encode(text))
    return next((whole[:i] for i in range(len(whole)) if whole[i : i + len(plain)] == plain), [])
