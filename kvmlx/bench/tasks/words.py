"""Words, and what is made of them by chance: keys, numbers, UUIDs."""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable
from functools import cache

import numpy as np

from kvmlx.bench.tasks.haystack import data, prose

ADJECTIVES = tuple(data("adjectives.txt").split())
NOUNS = tuple(data("nouns.txt").split())


def key(rng: np.random.Generator) -> str:
    """Return two words, such as ``wonderful-lighthouse``."""
    return f"{ADJECTIVES[rng.integers(len(ADJECTIVES))]}-{NOUNS[rng.integers(len(NOUNS))]}"


def number(rng: np.random.Generator, digits: int = 7) -> str:
    """Return a number of so many digits, the first not 0."""
    return str(rng.integers(10 ** (digits - 1), 10**digits))


def uuid4(rng: np.random.Generator) -> str:
    """Return a random UUID of version 4."""
    return str(uuid.UUID(bytes=rng.bytes(16), version=4))


def letters(rng: np.random.Generator, alphabet: str, count: int) -> str:
    """Return so many letters of an alphabet."""
    return "".join(alphabet[i] for i in rng.integers(len(alphabet), size=count))


def distinct(make: Callable[[], str], count: int, taken: tuple[str, ...] = ()) -> list[str]:
    """Return so many different results of ``make``, in the order drawn, none of which is in ``taken``."""
    out, seen = [], set(taken)
    while len(out) < count:
        if (word := make()) not in seen:
            seen.add(word)
            out.append(word)
    return out


@cache
def vocabulary() -> tuple[str, ...]:
    """Return single words of four to ten letters, each once, in alphabetical order: those above and the prose's."""
    # A word that also begins a sentence is still a word; one that is always a name is left out.
    written = set(re.findall(r"(?<![\w'-])[a-z]{4,10}(?![\w'-])", prose()))
    return tuple(sorted(written | {w for w in ADJECTIVES + NOUNS if 4 <= len(w) <= 10}))
