"""Several questions about one context, and a fact early in a long chat. These are kvmlx's own, not RULER's."""

from __future__ import annotations

from kvmlx.bench.tasks import words
from kvmlx.bench.tasks.base import N_DEPTHS, Draw, Plan
from kvmlx.bench.tasks.haystack import Prose, hidden
from kvmlx.bench.types import Question

FACTS_ASKED = 8
MAX_TOKENS = 24
DIGITS = 5
"""Of the numbers told."""
READ_WORDS = 60
"""Words of the book that the assistant reads out in one turn."""


PLACES = (
    "telephone number of the old mill",
    "combination of the bank's safe",
    "winning ticket of the village lottery",
    "weight of the church bell in pounds",
    "number of Doctor Ellery's library card",
    "registration of the postman's bicycle",
    "serial number of the town clock",
    "price of the grand piano in crowns",
    "licence of the fishing boat Marigold",
    "post office box of the watchmaker",
)
"""Of which each fact tells a number."""
OWN = ("booking number of my journey", "code of my suitcase", "number of my locker", "password of my telephone")
TALK: tuple[tuple[str, str], ...] = (
    ("What should I pack for a weekend by the sea?", "A warm jacket, comfortable shoes and a good book."),
    ("How long do I boil an egg?", "About seven minutes, if you like the yolk a little soft."),
    ("Why is the sky red in the evening?", "The light has a longer way through the air, and mostly red is left of it."),
    ("Which vegetables grow well in the shade?", "Lettuce, spinach and peas do well with little sun."),
    ("How do I get wine out of a tablecloth?", "Cover it with salt at once, then wash it with cold water."),
    ("What is a good way to learn a language?", "A little every day, and talking to people as soon as you can."),
    ("How do bees find their way home?", "They remember landmarks and know where the sun stands."),
    ("What could I cook with rice and mushrooms?", "A risotto, with an onion and a little cheese."),
)
READ_ON = ("Please read me some of the book.", "Go on, please.", "What comes next?", "And then?")


def several_questions(draw: Draw) -> Plan:
    """Plan prose with eight facts in it, each asked for by a question of its own; its units are words."""
    subjects = [PLACES[i] for i in draw.rng.permutation(len(PLACES))[:FACTS_ASKED]]
    answers = words.distinct(lambda: words.number(draw.rng, DIGITS), FACTS_ASKED)
    step = N_DEPTHS // FACTS_ASKED
    depths = [(draw.depth + i * step) % N_DEPTHS for i in range(FACTS_ASKED)]
    prose = Prose(draw.rng)
    told = [f"The {subject} is {answer}." for subject, answer in zip(subjects, answers, strict=True)]

    def write(units: int, filling: int) -> str:
        introduction = "Below is a text. Remember the numbers in it, since you will be asked for them afterwards."
        return f"{introduction}\n\n{hidden(prose.sentences(units), told, depths, ' ')}"

    questions = tuple(_question(*fact) for fact in zip(subjects, answers, strict=True))
    return Plan(questions, write)


def early_fact(draw: Draw) -> Plan:
    """Plan a chat whose first turn tells a fact; its units are exchanges after it."""
    subject = OWN[draw.rng.integers(len(OWN))]
    answer = words.number(draw.rng, DIGITS)
    order = draw.rng.permutation(len(TALK))
    prose = Prose(draw.rng)

    def write(units: int, filling: int) -> tuple[str, ...]:
        turns = [
            f"Hello! Before we begin: the {subject} is {answer}. Please remember it, I will ask you for it later.",
            "Hello! I will remember it. What can I do for you?",
        ]
        read = 0
        for i in range(units):
            # The last exchange reads on as long as there is room.
            last = i == units - 1
            if i % 3 == 1 and not last:
                turns += TALK[order[i // 3 % len(TALK)]]
                continue
            count = prose.whole(READ_WORDS, read) + (filling if last else 0)
            turns += [READ_ON[min(i, 1 + i % (len(READ_ON) - 1))], prose.text(count, read)]
            read += count
        return tuple(turns)

    return Plan((_question(subject, answer),), write, fills=True)


def _question(subject: str, answer: str) -> Question:
    """Ask the model; what is mine to the user is yours to the model."""
    prefix = f"The {subject.replace(' my ', ' your ')} is"
    return Question(f"What is the {subject}?", (answer,), prefix, MAX_TOKENS)
