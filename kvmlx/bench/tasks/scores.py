"""How an answer is scored: 0 to 1, by the name of a question's metric."""

from __future__ import annotations

import difflib
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvmlx.bench.types import Question
from kvmlx.types import KVMLXError, suggest


@dataclass(frozen=True, slots=True)
class Choice(Question):
    """A question whose answer is one of several classes."""

    choices: tuple[str, ...] = ()


def score(response: str, question: Question) -> float:
    """Return how well a response answers a question, 0 to 1."""
    if isinstance(question, Choice):
        return max(chosen(_line(response), answer, question.choices) for answer in question.answers)
    check_metric(question.metric)
    return METRICS[question.metric](response, question.answers)


def check_metric(name: str) -> None:
    """Raise KVMLXError unless this is a metric."""
    if name not in METRICS:
        raise KVMLXError(f"no metric {name!r}: there are {', '.join(METRICS)}.{suggest(name, METRICS)}")


def match_all(response: str, answers: Sequence[str]) -> float:
    """Return the share of the answers that the response contains (RULER's string_match_all)."""
    return sum(answer.lower() in response.lower() for answer in answers) / len(answers)


def match_any(response: str, answers: Sequence[str]) -> float:
    """Return whether the response contains one of the answers (RULER's string_match_part)."""
    return float(any(answer.lower() in response.lower() for answer in answers))


def f1(response: str, answer: str) -> float:
    """Return the F1 of the words in common, without case, punctuation and articles (SQuAD, LongBench)."""
    said, right = _words(response), _words(answer)
    common = (Counter(said) & Counter(right)).total()
    return 2 * common / (len(said) + len(right)) if common else 0.0


def rouge_l(response: str, answer: str) -> float:
    """Return the F1 of the longest common subsequence of words, over the whole text at once."""
    said, right = response.split(), answer.split()
    row = [0] * (len(right) + 1)
    for word in said:
        before = 0
        for i, other in enumerate(right, 1):
            before, row[i] = row[i], before + 1 if word == other else max(row[i], row[i - 1])
    return 2 * row[-1] / (len(said) + len(right)) if row[-1] else 0.0


def code_similarity(response: str, answer: str) -> float:
    """Return how alike the first line of code and the answer are: twice the matching characters / all of them."""
    lines = response.lstrip("\n").split("\n")
    code = next((line for line in lines if not re.search("`|#|//", line)), "")
    return round(difflib.SequenceMatcher(None, code, answer).ratio(), 2)


def counted(response: str, answer: str) -> float:
    """Return the share of the response's numbers that are the answer's (LongBench: counts, numbers of paragraphs)."""
    said, right = re.findall(r"\d+", response), re.findall(r"\d+", answer)
    return said.count(right[0]) / len(said) if said and right else 0.0


def chosen(response: str, answer: str, choices: Sequence[str]) -> float:
    """Return 1 / how many of the choices the response names, 0 if the answer is not among them (LongBench)."""
    named = [c for c in choices if c in response and not (c in answer and c != answer)]
    return 1.0 / len(named) if answer in named else 0.0


def _words(text: str) -> list[str]:
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def _line(response: str) -> str:
    return response.lstrip("\n").split("\n")[0]


def _best(metric: Callable[[str, str], float], *, line: bool = False) -> Callable[[str, Sequence[str]], float]:
    """Return the metric over several answers: that of the best one, for the whole response or its first line."""

    def of(response: str, answers: Sequence[str]) -> float:
        said = _line(response) if line else response
        return max(metric(said, answer) for answer in answers)

    return of


METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "all": match_all,
    "any": match_any,
    "f1": _best(f1),
    "f1_line": _best(f1, line=True),
    "rouge_l": _best(rouge_l),
    "rouge_l_line": _best(rouge_l, line=True),
    "code": _best(code_similarity),
    "count": _best(counted),
}
"""By the name that a question gives. Those with ``_line`` score the first line alone."""
