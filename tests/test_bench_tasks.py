"""The benchmark's generated tasks: RULER's definitions counted again, lengths, places of answers, prompts."""

from __future__ import annotations

import copy
import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvmlx import bench
from kvmlx.bench.tasks import TASKS, prompt_of, score
from kvmlx.bench.tasks.base import N_DEPTHS, draw, largest
from kvmlx.bench.tasks.haystack import NOISE, Prose, hidden, noise, prose
from kvmlx.bench.tasks.prompts import Chat
from kvmlx.bench.tasks.words import ADJECTIVES, NOUNS, vocabulary
from kvmlx.bench.types import Question, Sample
from kvmlx.demo_model import demo_model_path, is_intact
from kvmlx.types import KVMLXError
from tests.pieces import BOS, Pieces

LENGTHS = (512, 1024, 2048, 4096, 8192)


@pytest.fixture(scope="module")
def tokenizer() -> Pieces:
    return Pieces()


@pytest.fixture(scope="module")
def smollm() -> Any:
    if not is_intact(demo_model_path()):
        pytest.skip("the demo model is not there: run scripts/bootstrap, or `python -m kvmlx.demo_model`")
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(str(demo_model_path()))


def make(name: str, tokenizer: Any, *, index: int = 0, length: int = 1024, seed: int = 0) -> Sample:
    return TASKS[name].make(index, length, seed, tokenizer)


# Lengths and chance


def check_length(name: str, length: int, tokenizer: Any) -> None:
    try:
        sample = make(name, tokenizer, index=1, length=length)
    except KVMLXError as error:
        # Ten words 6 times each, in a list after a worked example, are more than that.
        assert (name, length) == ("cwe", 512), error
        assert re.search(r"cwe needs a prompt of at least \d+ tokens .* got 512", str(error))
        return
    prompts = [prompt_of(sample, question, tokenizer) for question in sample.questions]
    longest = max(len(p.context) + len(p.question) for p in prompts)
    assert 0.98 * length <= longest <= length
    assert sample.task == name and sample.index == 1 and sample.length == length


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", TASKS)
def test_prompts_are_as_long_as_asked_for(name: str, length: int, tokenizer: Pieces) -> None:
    check_length(name, length, tokenizer)


@pytest.mark.model
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", TASKS)
def test_prompts_are_as_long_as_asked_for_with_a_real_tokenizer(name: str, length: int, smollm: Any) -> None:
    check_length(name, length, smollm)


@pytest.mark.parametrize("name", TASKS)
def test_a_model_without_a_chat_template_gets_plain_text_of_the_same_length(name: str) -> None:
    plain = Pieces(chat=False)
    sample = make(name, plain)
    prompt = prompt_of(sample, sample.questions[0], plain)
    assert prompt.context.count(BOS) == 1 and prompt.context[0] == BOS and BOS not in prompt.question
    assert len(prompt.context) + len(prompt.question) <= 1024
    assert plain.decode(prompt.question).endswith(f"{sample.questions[0].text}\n\n" + _ending(sample))


def _ending(sample: Sample) -> str:
    return ("Assistant: " if isinstance(sample, Chat) else "") + sample.questions[0].prefix


@pytest.mark.parametrize("name", TASKS)
def test_samples_depend_on_their_numbers_only(name: str, tokenizer: Pieces) -> None:
    np.random.seed(0)
    first = make(name, tokenizer, index=2, seed=3)
    np.random.random(5)
    others = [
        make(name, tokenizer, index=1, seed=3),
        make(name, tokenizer, index=2, seed=4),
        make(name, tokenizer, index=2, seed=3, length=1100),
    ]
    assert make(name, tokenizer, index=2, seed=3) == first
    for other in others:
        assert other.context != first.context
        assert {a for q in other.questions for a in q.answers} != {a for q in first.questions for a in q.answers}


def test_tasks_draw_apart() -> None:
    numbers = {draw(name, 0, 1024, 0).rng.integers(2**60) for name in TASKS}
    assert len(numbers) == len(TASKS)


def test_forty_samples_have_all_depths_and_a_few_are_spread() -> None:
    depths = [draw("niah_single_1", i, 1024, 5).depth for i in range(N_DEPTHS)]
    assert sorted(depths) == list(range(N_DEPTHS))
    for start in range(N_DEPTHS - 4):
        places = sorted(depths[start : start + 4])
        around = [b - a for a, b in zip(places, [*places[1:], places[0] + N_DEPTHS], strict=True)]
        assert max(around) <= N_DEPTHS // 2


@pytest.mark.parametrize("unit", [1, 3, 7.3, 60])
@pytest.mark.parametrize("limit", [100, 101, 5000])
def test_largest_is_the_largest(unit: float, limit: int) -> None:
    asked = []

    def size(n: int) -> int:
        asked.append(n)
        return 40 + int(unit * n + 3 * math.sin(n) * (unit > 7))

    n = largest(size, 0, size(0), limit)
    assert size(n) <= limit < size(n + 1)
    assert len(asked) < 30


# Answers are where they should be, and nowhere else


@pytest.mark.parametrize("length", [1024, 4096])
@pytest.mark.parametrize("name", [n for n in TASKS if n not in ("vt", "cwe", "fwe")])
def test_each_answer_is_told_once_and_not_given_away(name: str, length: int, tokenizer: Pieces) -> None:
    for index in range(3):
        sample = make(name, tokenizer, index=index, length=length)
        answers = [a for question in sample.questions for a in question.answers]
        assert len(set(answers)) == len(answers)
        for answer in answers:
            assert sample.context.count(answer) == 1
            assert answer not in prose() and not any(answer in sentence for sentence in NOISE)
            for question in sample.questions:
                assert answer.lower() not in f"{question.text} {question.prefix}".lower()


@pytest.mark.parametrize("name", ["vt", "cwe", "fwe"])
def test_answers_in_words_are_not_given_away(name: str, tokenizer: Pieces) -> None:
    (question,) = make(name, tokenizer).questions
    # The worked example is part of the context; the question itself says nothing.
    assert not any(re.search(rf"\b{a}\b", f"{question.text} {question.prefix}", re.I) for a in question.answers)


SINGLE = [n for n in TASKS if n not in ("niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe")]


@pytest.mark.parametrize("name", SINGLE)
def test_depths_are_those_of_the_answers(name: str, tokenizer: Pieces) -> None:
    sample = make(name, tokenizer, index=1)
    assert len(sample.depths) == len(sample.questions)
    for depth, question in zip(sample.depths, sample.questions, strict=True):
        place = round(depth * len(sample.context))
        assert sample.context[place:].startswith(question.answers[0])


@pytest.mark.parametrize("name", sorted(set(TASKS) - set(SINGLE)))
def test_answers_in_several_places_have_no_depth(name: str, tokenizer: Pieces) -> None:
    assert make(name, tokenizer).depths == ()


@pytest.mark.parametrize("name", ["niah_single_1", "niah_single_2", "niah_multikey_1", "niah_multikey_2"])
def test_the_asked_needle_is_at_the_depth_drawn(name: str, tokenizer: Pieces) -> None:
    for index in range(6):
        wanted = draw(name, index, 8192, 0).depth / (N_DEPTHS - 1)
        (depth,) = make(name, tokenizer, index=index, length=8192).depths
        assert depth == pytest.approx(wanted, abs=0.04)


def test_hidden_puts_needles_where_their_share_of_the_text_ends() -> None:
    pieces = ["x" * 10] * 78
    placed = hidden(pieces, ["a", "b", "c"], [39, 0, 20], " ").split()
    assert (placed.index("b"), placed.index("c"), placed.index("a")) == (0, 1 + 40, 80)
    # Half of these characters are before the long piece, or after it.
    assert hidden(["x", "y" * 100, "z" * 99], ["a"], [20], " ").split().index("a") == 2
    assert hidden(["x"], ["a", "b", "c"], [5, 1, 3], " ") == "b c a x"


# RULER's definitions

WORD, NUMBER = r"[a-z]+-[a-z]+", r"[1-9]\d{6}"
UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
NIAH = {
    # kind of key, kind of value, keys, values of each, keys asked for
    "niah_single_1": (WORD, NUMBER, 1, 1, 1),
    "niah_single_2": (WORD, NUMBER, 1, 1, 1),
    "niah_single_3": (WORD, UUID, 1, 1, 1),
    "niah_multikey_1": (WORD, NUMBER, 4, 1, 1),
    "niah_multikey_2": (WORD, NUMBER, None, 1, 1),
    "niah_multikey_3": (UUID, UUID, None, 1, 1),
    "niah_multivalue": (WORD, NUMBER, 1, 4, 1),
    "niah_multiquery": (WORD, NUMBER, 4, 1, 4),
}


@pytest.mark.parametrize("length", [1024, 4096])
@pytest.mark.parametrize("name", NIAH)
def test_needles_are_rulers(name: str, length: int, tokenizer: Pieces) -> None:
    key, value, n_keys, n_values, n_queries = NIAH[name]
    sample = make(name, tokenizer, length=length)
    told = re.findall(rf"special magic (?:number|uuid)s? for ({key}) is: ({value})\.", sample.context)
    of: dict[str, list[str]] = {}
    for k, v in told:
        of.setdefault(k, []).append(v)
    if n_keys is None:
        assert len(told) > 0.8 * length / (len(tokenizer.encode(sample.context)) / len(told))
    else:
        assert len(of) == n_keys
    assert {len(v) for v in of.values()} == {n_values}
    assert len({v for vs in of.values() for v in vs}) == len(told)
    (question,) = sample.questions
    asked = [k for k in of if k in question.text]
    assert len(asked) == n_queries and all(k in question.prefix for k in asked)
    assert sorted(question.answers) == sorted(v for k in asked for v in of[k])
    assert question.max_tokens == 128 and question.metric == "all"


def test_haystacks_are_what_the_names_say(tokenizer: Pieces) -> None:
    lines = make("niah_single_1", tokenizer).context.split("\n")[2:]
    needles = [line for line in lines if "magic" in line]
    assert len(needles) == 1 and {x for x in lines if x not in needles} <= {
        *noise(5),
        *noise(1),
        *noise(2),
        *noise(3),
        *noise(4),
    }
    for name in ("niah_multikey_2", "niah_multikey_3"):
        lines = make(name, tokenizer, length=4096).context.split("\n")[2:]
        others = [line for line in lines if not line.startswith("The special magic")]
        # What is left is shorter than one line of needles.
        assert len(others) <= 2 and len(lines) > 50
        assert len(tokenizer.encode(" ".join(others))) <= max(
            len(tokenizer.encode(x)) for x in lines if x not in others
        )
    for name in ("niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multivalue", "niah_multiquery"):
        text = make(name, tokenizer).context.split("\n\n")[1]
        sentences = re.sub(r"(The|One of the) special magic \w+ for \S+ is: \S+", "", text).split()
        written = set(prose().split())
        # The last word has lost its sign, or got a stop.
        assert sum(word not in written for word in sentences) <= 1


def test_variables_are_rulers(tokenizer: Pieces) -> None:
    sample = make("vt", tokenizer, length=2048)
    (question,) = sample.questions
    text = sample.context.split("\n\n")[-1]
    assigned = re.findall(r"VAR ([A-Z]{5}) = (?:VAR ([A-Z]{5})|(\d{5}))\n", f"{text}\n")
    names = [name for name, _, _ in assigned]
    assert len(names) == len(set(names)) == 5  # one chain of four hops
    assert assigned[0][2] and [before for _, before, _ in assigned[1:]] == names[:-1]
    assert question.answers == tuple(names) and question.max_tokens == 30 and question.metric == "all"
    value = assigned[0][2]
    assert value in question.text and value in question.prefix
    shown = re.findall(r"VAR ([A-Z]{3}) = ", sample.context)
    assert len(set(shown)) == 5 and f"They are: {', '.join(shown)}\n" in sample.context
    assert sample.context.count(value) == 1


def test_variables_are_hidden_in_noise(tokenizer: Pieces) -> None:
    lines = make("vt", tokenizer, length=2048).context.split("\n\n")[-1].split("\n")
    others = [line for line in lines if not line.startswith("VAR")]
    assert len(lines) - len(others) == 5 and set(others[:-1]) == set(noise(5))


@pytest.mark.parametrize(
    ("length", "often", "seldom", "example"), [(1024, 6, 1, (3, 1, 20)), (4096, 30, 3, (10, 3, 40))]
)
def test_common_words_are_rulers(
    length: int, often: int, seldom: int, example: tuple[int, int, int], tokenizer: Pieces
) -> None:
    sample = make("cwe", tokenizer, length=length)
    (question,) = sample.questions
    shown, listed = [p for p in sample.context.split("\n\n") if p.startswith("1. ")]
    for text, (many, few, n_words) in ((shown, example), (listed, (often, seldom, None))):
        entries = re.findall(r"(\d+)\. ([a-z-]+)", text)
        assert [int(i) for i, _ in entries] == list(range(1, len(entries) + 1))
        counts = Counter(word for _, word in entries)
        assert Counter(counts.values())[many] == 10
        assert set(counts.values()) == {many, few}
        assert n_words is None or len(counts) == n_words
    common = {w for w, n in Counter(re.findall(r"\d+\. ([a-z-]+)", listed)).items() if n == often}
    assert common == set(question.answers) and len(question.answers) == 10
    assert not common & set(re.findall(r"\d+\. ([a-z-]+)", shown))
    words = set(re.findall(r"\d+\. ([a-z-]+)", listed))
    assert not any(answer in word for answer in common for word in words - {answer})
    assert question.max_tokens == 120 and question.metric == "all"


@pytest.mark.parametrize("length", [512, 1024, 8192])
def test_frequent_words_are_rulers(length: int, tokenizer: Pieces) -> None:
    sample = make("fwe", tokenizer, length=length)
    (question,) = sample.questions
    counts = Counter(sample.context.split("\n\n")[1].split())
    assert counts.most_common(1)[0][0] == "..."
    assert all(re.fullmatch("[a-z]{6}", word) for word in counts if word != "...")
    ranked = [n for _, n in counts.most_common()]
    # Zeta of 2: rank k has 6 / (pi k)^2 of the draws, rounded down; the dots tell how many draws there were.
    draws = [n for n in range(ranked[0], 3 * ranked[0]) if int(n * 6 / math.pi**2) == ranked[0]]
    assert any(
        [m for k in range(1, len(ranked) + 1) if (m := int(n * 6 / (math.pi * k) ** 2))] == ranked for n in draws
    )
    assert ranked[3] > ranked[4]
    assert list(question.answers) == [word for word, _ in counts.most_common(4)[1:]]
    assert question.max_tokens == 50 and question.metric == "all"


# Those that are not RULER's


def test_pairs_are_json(tokenizer: Pieces) -> None:
    for index in range(4):
        sample = make("kv_json", tokenizer, index=index, length=2048)
        (question,) = sample.questions
        pairs = json.loads(sample.context[sample.context.index("{") :])
        (key,) = re.findall(UUID, question.text)
        assert pairs[key] == question.answers[0] and question.prefix.endswith(f'"{key}": "')
        ids = [*pairs, *pairs.values()]
        assert len(set(ids)) == len(ids) and all(re.fullmatch(UUID, i) for i in ids)
        wanted = draw("kv_json", index, 2048, 0).depth * (len(pairs) - 1) // (N_DEPTHS - 1)
        assert list(pairs).index(key) == wanted


def test_several_questions_have_a_fact_each(tokenizer: Pieces) -> None:
    sample = make("several_questions", tokenizer, index=3)
    assert len(sample.questions) == 8 and len({q.text for q in sample.questions}) == 8
    for question in sample.questions:
        assert sample.context.count(f"{question.prefix} {question.answers[0]}.") == 1
        assert re.fullmatch(r"[1-9]\d{4}", question.answers[0])
        assert sample.context.count(question.prefix) == 1
    assert max(b - a for a, b in zip(sorted(sample.depths), sorted(sample.depths)[1:], strict=False)) < 0.3


def test_the_early_fact_is_in_the_first_turn_of_a_chat(tokenizer: Pieces) -> None:
    sample = make("early_fact", tokenizer, length=4096)
    assert isinstance(sample, Chat) and len(sample.turns) % 2 == 0 and len(sample.turns) > 40
    (question,) = sample.questions
    assert question.answers[0] in sample.turns[0]
    assert sample.depths[0] < 0.01
    assert "\n\n".join(sample.turns) == sample.context
    read = [turn for turn in sample.turns[3::2] if len(turn) > 200]
    assert len(read) > 10 and all(turn[-1] in ".!?\"')" for turn in read)


# Haystacks and words


def test_prose_goes_round_and_then_on_in_another_order() -> None:
    words = Prose(np.random.default_rng(1))
    total = len(prose().split())
    first, second = words.words(total), words.words(total, total)
    assert Counter(first) == Counter(second) == Counter(prose().split())
    assert first != second and first != prose().split()
    assert words.words(total) == first
    assert " ".join(words.sentences(500)).split()[:499] == first[:499]


def test_sentences_are_not_divided() -> None:
    words = Prose(np.random.default_rng(0))
    sentences = words.sentences(len(prose().split()))
    assert not [s for s in sentences if re.search(r"\b(Mr|Mrs|Dr|St)\.$", s) or s[0].islower()]
    assert len(sentences) > 800


def test_every_text_that_is_shipped_has_its_source_named() -> None:
    folder = Path(bench.__file__).parent / "data"
    readme = (folder / "README.md").read_text(encoding="utf-8")
    assert {path.name for path in folder.glob("*.txt")} == set(re.findall(r"`(\w+\.txt)`", readme))
    assert f"{len(prose().encode()):,} bytes" in readme


def test_words_are_different_words() -> None:
    for words in (ADJECTIVES, NOUNS, vocabulary()):
        assert len(set(words)) == len(words) and all(re.fullmatch("[a-z]+", w) for w in words)
    assert len(ADJECTIVES) * len(NOUNS) > 40_000 and len(vocabulary()) > 3_000


# From samples to tokens


@pytest.mark.parametrize("strips", [False, True])
@pytest.mark.parametrize("name", TASKS)
def test_context_and_question_are_the_whole_prompt(name: str, strips: bool) -> None:
    tokenizer = Pieces(strips=strips)
    sample = make(name, tokenizer)
    prompts = [prompt_of(sample, question, tokenizer) for question in sample.questions]
    assert len({p.context for p in prompts}) == 1
    for prompt, question in zip(prompts, sample.questions, strict=True):
        context, rest = tokenizer.decode(prompt.context), tokenizer.decode(prompt.question)
        if isinstance(sample, Chat):
            turns = [*sample.turns, question.text]
            messages = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
        else:
            assert context.endswith(sample.context)
            messages = [{"role": "user", "content": f"{sample.context}\n\n{question.text}"}]
        whole = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert context + rest == whole + question.prefix
        assert question.text in rest and rest.endswith(f"<assistant>{question.prefix}")
        assert context.count("<bos>") == 1 and "<bos>" not in rest


def test_a_question_without_a_prefix_leaves_no_blank_at_the_end() -> None:
    plain = Pieces(chat=False)
    sample = Sample("mine", 0, 100, "A text.", (Question("Why?", ("because",)),))
    prompt = prompt_of(sample, sample.questions[0], plain)
    assert plain.decode(prompt.context) == "<bos>A text."
    assert plain.decode(prompt.question) == "\n\nWhy?\n\n"


@pytest.mark.model
@pytest.mark.parametrize("name", ["niah_single_2", "early_fact", "kv_json"])
def test_both_frameworks_tokenizers_give_the_same_prompt(name: str, smollm: Any) -> None:
    load = pytest.importorskip("mlx_lm.tokenizer_utils").load
    theirs = load(demo_model_path())
    sample = make(name, smollm)
    assert make(name, theirs) == sample
    prompt = prompt_of(sample, sample.questions[0], smollm)
    assert prompt_of(sample, sample.questions[0], theirs) == prompt
    text = smollm.decode([*prompt.context, *prompt.question])
    assert text.endswith(sample.questions[0].prefix) and text.count("<|im_start|>assistant") >= 1


@pytest.mark.model
def test_a_template_that_writes_the_date_writes_the_same_one_every_day(smollm: Any) -> None:
    dated = copy.deepcopy(smollm)
    date = "{{ date_string if date_string is defined else strftime_now('%d %B %Y') }}"
    dated.chat_template = f"{date}: {{% for m in messages %}}{{{{ m['content'] }}}}{{% endfor %}}"
    sample = make("vt", dated)
    assert dated.decode(prompt_of(sample, sample.questions[0], dated).context).startswith("1 January 2025: Variables")


@pytest.mark.parametrize("name", TASKS)
def test_the_answers_themselves_score_one_and_nothing_scores_nothing(name: str, tokenizer: Pieces) -> None:
    for question in make(name, tokenizer).questions:
        assert score(f" {', '.join(question.answers)}.", question) == 1.0
        assert score("I do not know.", question) == 0.0
