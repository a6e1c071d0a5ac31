"""Which words are the most common ones: in a numbered list, and in a coded text.

RULER, 2404.06654. Common words: ten of them 30 times each, all others 3 times, a worked example before the list; for
prompts under 4,096 tokens 6 times and once. Frequent words: the rank k of coded words has a share of k^-alpha, the
first rank is dots, the three after it are asked for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from string import ascii_lowercase

import numpy as np

from kvmlx.bench.tasks import words
from kvmlx.bench.tasks.base import Draw, Plan
from kvmlx.bench.types import Question

COMMON = 10
CWE_MAX_TOKENS = 120
CWE_INTRODUCTION = (
    "Below is a numbered list of words. Some of the words are in it more often than the others. "
    "Remember the most common ones."
)

FREQUENT = 3
FWE_MAX_TOKENS = 50
ALPHA = 2.0
ZETA = math.pi**2 / 6
"""Riemann's zeta of `ALPHA`."""
CODED_LETTERS = 6
DOTS = "..."
FWE_INTRODUCTION = (
    "Below is a text in code. Count how often each of the coded words appears, and find the three most frequent ones. "
    f"The dots {DOTS} are no word."
)


def common_words(draw: Draw) -> Plan:
    """Plan a list; its units are the uncommon words."""
    short = draw.length < 4096
    often, seldom = (6, 1) if short else (30, 3)
    pool = _pool(draw)
    clear = _clear(pool, draw.rng, 2 * COMMON)
    theirs, common = clear[:COMMON], clear[COMMON:]
    rest = [w for w in pool if w not in {*theirs, *common}]
    shown, rest = (rest[:10], rest[10:]) if short else (rest[:30], rest[30:])
    example = _listed(theirs, shown, *((3, 1) if short else (10, 3)), draw.rng.random(1000))
    order = draw.rng.random(COMMON * often + len(rest) * seldom)
    question = Question(
        text=f"Question: What are the {COMMON} most common words in the list above?",
        answers=tuple(common),
        prefix=f"Answer: The {COMMON} most common words in the list are:",
        max_tokens=CWE_MAX_TOKENS,
    )
    answered = " ".join(f"{i}. {word}" for i, word in enumerate(theirs, 1))

    def write(units: int, filling: int) -> str:
        mine = _listed(common, rest[:units], often, seldom, order)
        return (
            f"{CWE_INTRODUCTION}\n\n{example}\n\n{question.text}\n{question.prefix} {answered}\n\n"
            f"{CWE_INTRODUCTION}\n\n{mine}"
        )

    return Plan((question,), write)


def frequent_words(draw: Draw) -> Plan:
    """Plan a coded text; its units are draws from the distribution, of which each rank has its rounded-down share."""
    n_words = max(8, draw.length // 50)
    ranked = [DOTS, *words.distinct(lambda: words.letters(draw.rng, ascii_lowercase, CODED_LETTERS), n_words - 1)]
    seeds = draw.rng.integers(2**63, size=n_words)
    question = Question(
        text=f"Question: Which {FREQUENT} coded words appear most often in the text above? Leave out the dots.",
        answers=tuple(ranked[1 : 1 + FREQUENT]),
        prefix=f"Answer: The {FREQUENT} coded words that appear most often in the text above are:",
        max_tokens=FWE_MAX_TOKENS,
    )

    def write(units: int, filling: int) -> str:
        # Each occurrence has a place of its own, so that a longer text has the shorter one's words in the same order.
        placed = [
            (place, word)
            for word, seed, count in zip(ranked, seeds, occurrences(units, n_words), strict=True)
            for place in np.random.default_rng(seed).random(count)
        ]
        return f"{FWE_INTRODUCTION}\n\n{' '.join(word for _, word in sorted(placed))}"

    return Plan((question,), write, least=distinct_from(FREQUENT + 1))


def occurrences(draws: int, n_words: int) -> list[int]:
    """Return how often each rank appears among so many draws of a Zeta distribution, rounded down."""
    return [int(draws * rank**-ALPHA / ZETA) for rank in range(1, n_words + 1)]


def distinct_from(rank: int) -> int:
    """Return the draws from which on a rank always appears more often than the next one."""
    return math.ceil(ZETA / (rank**-ALPHA - (rank + 1) ** -ALPHA))


def _pool(draw: Draw) -> list[str]:
    """Return words in an order drawn by chance, enough for any list of this length."""
    single = words.vocabulary()
    pool = [single[i] for i in draw.rng.permutation(len(single))]
    # The shortest entry, a number and a word, has more than two tokens.
    return pool + words.distinct(lambda: words.key(draw.rng), max(0, draw.length // 2 - len(pool)))


def _clear(pool: Sequence[str], rng: np.random.Generator, count: int) -> list[str]:
    """Return words of the pool that are in no other one of it: an answer is looked for as a string."""
    out: list[str] = []
    for i in rng.permutation(len(words.vocabulary())):
        word: str = pool[int(i)]
        if len(out) < count and not any(word in other for other in pool if other != word):
            out.append(word)
    return out


def _listed(common: Sequence[str], others: Sequence[str], often: int, seldom: int, order: np.ndarray) -> str:
    """Return a numbered list with the words so often, sorted by ``order``."""
    entries = [w for w in common for _ in range(often)] + [w for w in others for _ in range(seldom)]
    mixed = [entries[i] for i in np.argsort(order[: len(entries)], kind="stable")]
    return " ".join(f"{i}. {word}" for i, word in enumerate(mixed, 1))
