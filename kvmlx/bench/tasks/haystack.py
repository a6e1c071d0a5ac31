"""What needles are hidden in: sentences that say nothing, and real prose."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cache
from importlib.resources import files
from itertools import pairwise

import numpy as np

from kvmlx.bench.tasks.base import N_DEPTHS

NOISE = (
    "The river is wide.",
    "The wind is warm.",
    "The road is long.",
    "We walk for a while.",
    "Then we turn back again.",
)
ABBREVIATIONS = frozenset({"Mr.", "Mrs.", "Dr.", "St."})
"""Words that end with a stop and no sentence."""


def data(name: str) -> str:
    """Return a file that comes with the package; data/README.md says where each is from."""
    return (files("kvmlx.bench") / "data" / name).read_text(encoding="utf-8")


@cache
def prose() -> str:
    """Return some hundred kilobytes of prose in the public domain."""
    return data("prose.txt")


def noise(sentences: int) -> list[str]:
    """Return lines of five sentences each, the last of what is left."""
    lines, left = divmod(sentences, len(NOISE))
    return [" ".join(NOISE)] * lines + ([" ".join(NOISE[:left])] if left else [])


class Prose:
    """Prose by the word, from a paragraph drawn by chance; past its end come all paragraphs in another order."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self._paragraphs = [p.split() for p in prose().split("\n\n") if p.strip()]
        start = int(rng.integers(len(self._paragraphs)))
        self._words = [w for p in self._paragraphs[start:] + self._paragraphs[:start] for w in p]

    def words(self, count: int, start: int = 0) -> list[str]:
        """Return the words ``start`` to ``start + count``."""
        while len(self._words) < start + count:
            self._words += [w for i in self._rng.permutation(len(self._paragraphs)) for w in self._paragraphs[i]]
        return self._words[start : start + count]

    def text(self, count: int, start: int = 0) -> str:
        """Return the same as text that ends with a stop."""
        return _closed(self.words(count, start))

    def whole(self, least: int, start: int = 0) -> int:
        """Return how many words from ``start`` on are whole sentences, and at least so many."""
        count = least
        while not _ends(*self.words(2, start + count - 1)):
            count += 1
        return count

    def sentences(self, count: int) -> list[str]:
        """Return the first ``count`` words as sentences, the last one ended where the words are."""
        out, sentence = [], []
        for word, following in pairwise(self.words(count + 1)):
            sentence.append(word)
            if _ends(word, following):
                out.append(" ".join(sentence))
                sentence = []
        return [*out, _closed(sentence)] if sentence else out


def hidden(pieces: Sequence[str], needles: Iterable[str], depths: Iterable[int], between: str) -> str:
    """Return the pieces of a haystack with needles among them.

    Args:
        pieces: at least one.
        needles: what is hidden.
        depths: of each needle, in ``range(N_DEPTHS)``; it goes between the two pieces that are nearest to this share
            of the characters, in the order of the depths.
        between: joins pieces and needles.
    """
    begins = np.cumsum([0, *map(len, pieces)])
    at: list[list[str]] = [[] for _ in begins]
    for depth, needle in sorted(zip(depths, needles, strict=True)):
        at[int(np.abs(begins - begins[-1] * depth / (N_DEPTHS - 1)).argmin())].append(needle)
    return between.join([part for i, piece in enumerate(pieces) for part in (*at[i], piece)] + at[-1])


def _ends(word: str, following: str) -> bool:
    """Whether a sentence ends between these words."""
    stops = re.search(r"[.!?][\"')]*$", word) is not None and word not in ABBREVIATIONS
    return stops and not following[0].islower()


def _closed(words: Sequence[str]) -> str:
    text = " ".join(words)
    return text if not text or text[-1] in ".!?" else re.sub(r"\W+$", "", text) + "."
