"""UUID keys and values as one JSON object, and the value of one key ("Lost in the middle", 2307.03172)."""

from __future__ import annotations

from kvmlx.bench.tasks import words
from kvmlx.bench.tasks.base import N_DEPTHS, Draw, Plan
from kvmlx.bench.tasks.haystack import noise
from kvmlx.bench.types import Question

MAX_TOKENS = 128
INTRODUCTION = "Below is a JSON object with keys and values. Remember which value each key has."


def plan(draw: Draw) -> Plan:
    """Plan a sample; its units are the pairs besides the one asked for."""
    # A pair has more than two tokens.
    ids = words.distinct(lambda: words.uuid4(draw.rng), 2 * (draw.length // 2))
    pairs = list(zip(ids[::2], ids[1::2], strict=True))
    asked, others = pairs[0], pairs[1:]
    question = Question(
        text=f'What is the value of the key "{asked[0]}" in the JSON object above?',
        answers=(asked[1],),
        prefix=f'The value of this key is:\n"{asked[0]}": "',
        max_tokens=MAX_TOKENS,
    )

    def write(units: int, filling: int) -> str:
        place = units * draw.depth // (N_DEPTHS - 1)
        rows = [*others[:place], asked, *others[place:units]]
        written = ",\n".join(f'"{key}": "{value}"' for key, value in rows)
        filled = "".join(f"{line}\n" for line in noise(filling))
        return f"{filled}{INTRODUCTION}\n\n{{{written}}}"

    return Plan((question,), write, fills=True)
